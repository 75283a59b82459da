"""An evaluation's folder: what is kept, what is done again, and what refuses to be mixed.

Layers: pure, with scripted trajectories; then, marked dist, the real command on real engines.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_sod.config.load import load_eval_config
from megatron_sod.data.tiny_models import STUDENT, write_tiny_model
from megatron_sod.errors import ConfigError, DataError, ModelError, SandboxError
from megatron_sod.eval.evaluation import evaluate_model
from megatron_sod.eval.protocol import model_fingerprint
from tests.helpers.launch import ROOT
from tests.helpers.scripted_samples import Sampler, eval_config, evaluate


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, **STUDENT)
    return str(folder)


def test_every_prompt_is_sampled_for_every_seed_and_reported(model, tmp_path):
    sampler = Sampler()
    report = evaluate(
        eval_config(model, "eval.seeds=[0,7]", "eval.prompts_per_round=2"), tmp_path, sampler
    )
    assert len(sampler.asked) == 10 == len(set(sampler.asked))
    assert {tag for tag, _ in sampler.asked} == {"eval-seed0", "eval-seed7"}
    overall = report["overall"]
    assert overall["avg@3"] == pytest.approx(1 / 3) and overall["pass"]["3"] == 1.0
    assert overall["maj"]["3"] == 0.0 and len(overall["per_seed"]) == 2
    assert report["scalars"]["val-core/tiny_world/acc/mean@3"] == pytest.approx(1 / 3)
    assert report["scalars"]["val-core/tiny_world/acc/best@3/mean"] == 1.0
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["overall"] == overall and len(stored["protocol_hash"]) == 12
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").open()]
    assert len(rows) == 30 and {row["prediction"] for row in rows} > {"0"}


def test_an_evaluation_that_was_killed_goes_on_where_it_stood(model, tmp_path):
    config = eval_config(model, "eval.prompts_per_round=1")
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, tmp_path, Sampler(fail_after=2))
    samples = tmp_path / "samples.jsonl"
    whole = samples.read_text()
    # the kill came in the middle of the second prompt's lines
    samples.write_text("".join(whole.splitlines(keepends=True)[:5])[:-20])
    second = Sampler()
    report = evaluate(config, tmp_path, second)
    assert len(second.asked) == 4  # all but the first
    assert report["overall"]["num_graded"] == 15
    third = Sampler()
    again = evaluate(config, tmp_path, third)
    assert third.asked == [] and again["overall"] == report["overall"]


@pytest.mark.parametrize(
    "override",
    ["eval.temperature=0.7", "rollout.max_turns=3", "sandbox.timeout_s=7", "eval.limit=4"],
)
def test_a_folder_of_another_protocol_is_refused(model, tmp_path, override):
    evaluate(eval_config(model), tmp_path, Sampler())
    with pytest.raises(DataError, match="samples of protocol_hash"):
        evaluate(eval_config(model, override), tmp_path, Sampler())


def test_a_folder_of_another_model_is_refused(model, tmp_path):
    evaluate(eval_config(model), tmp_path / "out", Sampler())
    other = tmp_path / "other"
    write_tiny_model(other, **{**STUDENT, "num_hidden_layers": 3})
    assert model_fingerprint(other) != model_fingerprint(model)
    with pytest.raises(DataError, match="samples of model_fingerprint"):
        evaluate(eval_config(str(other)), tmp_path / "out", Sampler())


def test_a_megatron_checkpoint_is_refused_with_the_way_out(tmp_path):
    checkpoint = write_tiny_model(tmp_path / "iter_000010", **STUDENT)
    for name in ("metadata.json", ".metadata"):  # what marks one
        (checkpoint / name).touch()
    with pytest.raises(ModelError, match="convert it with tools/convert_megatron_to_hf.py"):
        evaluate_model(eval_config(str(checkpoint)), tmp_path / "out")


class ScriptedController:
    """Stands in for engines and workers, whose sandbox has `level`."""

    def __init__(self, level: str):
        self.fleet = SimpleNamespace(sandbox_level=level)
        self.sampler, self.is_closed = Sampler(), False

    def wait_until_ready(self, what):
        pass

    def rollout(self, prompts, *, tag, num_generations, temperature, top_p):
        assert (temperature, top_p) == (1.0, 0.6)
        return self.sampler(prompts, tag, num_generations)

    def close(self):
        self.is_closed = True


@pytest.fixture
def controller(monkeypatch):
    module = pytest.importorskip("megatron_sod.rollout.controller", reason="needs ray")
    scripted = ScriptedController("L3")
    monkeypatch.setattr(module, "RolloutController", lambda *_, **__: scripted)
    return scripted


def test_engines_are_started_for_what_is_missing_only(model, tmp_path, controller):
    config = eval_config(model, "sandbox.level=L3", "observe.loggers=[]")
    report = evaluate_model(config, tmp_path)
    assert len(controller.sampler.asked) == 5 and controller.is_closed
    controller.is_closed = False
    assert evaluate_model(config, tmp_path)["overall"] == report["overall"]
    assert len(controller.sampler.asked) == 5 and not controller.is_closed


def test_workers_isolated_otherwise_than_the_protocol_says_are_refused(model, tmp_path, controller):
    config = eval_config(model, "sandbox.level=L2", "observe.loggers=[]")
    with pytest.raises(SandboxError, match="level L3, the protocol L2.*set sandbox.level=L3"):
        evaluate_model(config, tmp_path)
    assert controller.sampler.asked == [] and controller.is_closed


def test_defaults_are_the_papers_sampling(model):
    config = load_eval_config(None, [], model=model, data=["x.jsonl"])
    assert (config.eval.num_samples, config.eval.temperature, config.eval.top_p) == (32, 1.0, 0.6)
    assert config.rollout.max_turns == 16


def test_no_data_is_refused(model):
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        load_eval_config(None, [], model=model)


def _evaluate(out: Path, *arguments: str) -> tuple[dict, str]:
    """The real command; its report and what it said."""
    command = [sys.executable, "tools/evaluate.py", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "report.json").read_text()), done.stderr


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif("SOD_SHARED_DATA" not in os.environ, reason="SOD_SHARED_DATA is not set")
def test_real_rows_the_real_tokenizer_and_a_random_model_run_to_the_end(tmp_path):
    from tests.end_to_end.test_tiny_run import _write_real_vocabulary_model

    data = Path(os.environ["SOD_SHARED_DATA"])
    _write_real_vocabulary_model(tmp_path / "model", data)
    _add_weights(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--data", str(data / "gsm8k_test.jsonl")]
    arguments += ["--num-samples", "2", "eval.limit=6", "rollout.max_response_length=64"]
    arguments += ["rollout.max_turns=2", "rollout.max_prompt_length=700"]
    arguments += ["rollout.max_observation_length=32", "eval.prompts_per_round=4"]
    arguments += ["observe.loggers=[tensorboard]"]
    report, said = _evaluate(tmp_path / "out", *arguments)
    numbers = report["sources"]["gsm8k_test"]
    assert numbers["num_prompts"] == 6 and numbers["num_graded"] == 12
    assert "| gsm8k_test" in said
    assert list((tmp_path / "out" / "tensorboard").glob("events*"))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_the_demos_models_score_what_the_demo_says(tmp_path, model):
    """256 tasks, one sample each, drawn anew: four standard errors of the difference."""
    pages = (ROOT / "docs/demo_results.md").read_text().splitlines()
    (row,) = [line for line in pages if line.startswith("| SOD, seed 0 |")]
    cells = [cell.strip() for cell in row.split("|")]
    printed = float((cells[2] if model == "student" else cells[5]).split("%")[0]) / 100
    arguments = ["--config", "configs/demo_cpu.yaml", "--model", f"configs/demo/{model}"]
    arguments += ["--data", "tiny_world:heldout:256", "--num-samples", "1"]
    report, _ = _evaluate(tmp_path, *arguments, "eval.prompts_per_round=256")
    found = report["overall"]["avg@1"]
    error = math.sqrt(2 * max(printed * (1 - printed), 0.01) / 256)
    assert abs(found - printed) < 4 * error, (found, printed)
    assert report["overall"]["num_infra_errors"] == 0


def _add_weights(directory: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from megatron_sod.convert.layout import hf_shapes
    from megatron_sod.model.geometry import load_geometry

    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.02 + ("norm" in name)
        for name, shape in hf_shapes(load_geometry(directory)).items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
