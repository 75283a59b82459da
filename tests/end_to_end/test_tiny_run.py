"""The whole job for real: torchrun with two ranks, Ray, a vLLM engine, the sandbox, resume.

Layers: one real run (cold start, iterations, SIGKILL, resume), checked from its files.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

from megatron_sod.data.tiny_models import STUDENT, TEACHER, write_tiny_model
from megatron_sod.observe.reference_names import REFERENCE_NAMES
from megatron_sod.observe.watchdog import SIGNALS
from tests.docs.metric_names import undocumented
from tests.helpers.launch import end, marker_of, processes_of, run, start

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A student cold-started for a moment, and a random teacher."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "init", **STUDENT)
    write_tiny_model(folder / "teacher", **TEACHER)
    log = run(
        "train_sft.py",
        "--config",
        "configs/demo/sft_student.yaml",
        "cluster.gpus_per_node=1",
        f"student.path={folder / 'init'}",
        "data.conversations=[tiny_world:train:200]",
        "train.num_steps=6",
        "train.global_batch_size=8",
        f"out={folder / 'student'}",
        nproc=1,
        log=folder / "sft.log",
        timeout_s=300,
    )
    assert "step 6/6" in log
    return folder


@pytest.fixture(scope="module")
def finished_run(models, tmp_path_factory) -> Path:
    """A run whose ranks are killed after the first iteration and that is started again."""
    run_dir = tmp_path_factory.mktemp("run") / "killed"
    arguments = _arguments(models, run_dir)
    descendants = marker_of(run_dir.parent / "first.log")
    first = start("train_sod.py", *arguments, nproc=2, log=run_dir.parent / "first.log")
    try:
        _wait_for(run_dir / "checkpoints" / "latest", first, run_dir.parent / "first.log")
        marker = str(run_dir)
        ranks = [pid for pid in processes_of(marker) if "train_sod" in _command_line(pid)]
        lines = [_command_line(pid) for pid in processes_of(descendants)]
        assert any("VLLM" in line for line in lines), f"no engine process among {lines}"
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
        first.wait(timeout=60)
        _wait_until_gone(descendants)
    finally:
        end(first)
    log = run("train_sod.py", *arguments, nproc=2, log=run_dir.parent / "second.log", timeout_s=420)
    assert "resumed after iteration" in log
    return run_dir


def test_killed_run_resumes_and_counts_every_iteration_once(finished_run):
    rows = [json.loads(line) for line in (finished_run / "metrics.jsonl").open()]
    assert [row["iteration"] for row in rows] == [1, 2]
    assert all(row["actor/steps_skipped"] == 0 for row in rows)
    assert all(abs(row["actor/loss"]) < 100 for row in rows)


def test_engines_held_the_trainers_weights_after_every_transfer(finished_run):
    rows = [json.loads(line) for line in (finished_run / "metrics.jsonl").open()]
    assert all(0 <= row["transfer/canary_max_error"] < 1e-3 for row in rows)


def test_steps_table_has_one_row_per_step_with_weights(finished_run):
    table = pyarrow.parquet.read_table(finished_run / "steps.parquet").to_pylist()
    keys = {(row["iteration"], row["trajectory"], row["step"]) for row in table}
    assert len(keys) == len(table) > 0
    first_steps = [row["w_k"] for row in table if row["step"] == 1 and row["w_k"] is not None]
    assert first_steps and all(w == pytest.approx(1.0) for w in first_steps)


def test_exported_student_loads_in_transformers(finished_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished_run / "hf")
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "hf")
    logits = model(torch.tensor([tokenizer("Compute")["input_ids"]])).logits
    assert torch.isfinite(logits).all()
    assert logits.shape[-1] == model.config.vocab_size


def test_run_directory_holds_what_is_promised(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "steps.parquet", "checkpoints", "hf"} <= names
    summary = json.loads((finished_run / "summary.json").read_text())
    assert 0 <= summary["student_before"] <= 1 and 0 <= summary["student_after"] <= 1
    assert "data-run-payload" in (finished_run / "report.html").read_text()


def test_a_replay_trains_to_the_same_bits_without_engines(finished_run, models):
    replay_dir = finished_run.parent / "replay"
    log = run(
        "train_sod.py",
        *_arguments(models, replay_dir),
        "rollout.record=false",
        f"rollout.replay={finished_run / 'rollouts'}",
        nproc=2,
        log=finished_run.parent / "replay.log",
        timeout_s=200,
    )
    assert "engine(s) ready" not in log and "no engine, no evaluation" in log
    exported = [
        (folder / "hf/model.safetensors").read_bytes() for folder in (finished_run, replay_dir)
    ]
    assert exported[0] == exported[1]
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        for folder in (finished_run, replay_dir)
    ]
    for original, replayed in zip(*rows, strict=True):
        assert "transfer/bytes" in original and "transfer/bytes" not in replayed
        for name in replayed:
            if name.startswith(("actor/", "sod/", "rollout/", "tool/")):
                assert replayed[name] == original[name], name


@pytest.mark.skipif("SOD_SHARED_DATA" not in os.environ, reason="SOD_SHARED_DATA is not set")
def test_real_text_and_the_real_vocabulary_run_one_iteration(tmp_path):
    """GSM8K rows by path, Qwen3's tokenizer and its 151,936 rows, a random tiny student."""
    data = Path(os.environ["SOD_SHARED_DATA"])
    for role in ("student", "teacher"):
        _write_real_vocabulary_model(tmp_path / role, data)
    run_dir = tmp_path / "run"
    run(
        "train_sod.py",
        *_arguments(tmp_path, run_dir),
        f"data.train=[{data / 'gsm8k_train_2000.jsonl'}]",
        "data.eval=[]",
        "data.prompt_key=question",
        "train.num_iterations=1",
        "data.tools_in_prompt=true",
        "rollout.max_prompt_length=512",
        "rollout.max_response_length=96",
        "rollout.max_turns=2",
        "train.tokens_per_micro_batch=1024",
        nproc=2,
        log=tmp_path / "run.log",
        timeout_s=420,
    )
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    assert len(rows) == 1 and rows[0]["rollout/tokens"] > 0
    assert rows[0]["rollout/ids_without_text"] >= 0


def _write_real_vocabulary_model(directory: Path, data: Path) -> None:
    source = data / "tokenizer_qwen3_0p6b"
    write_tiny_model(directory, vocab_size=151_936)
    config = json.loads((directory / "config.json").read_text())
    for path in directory.iterdir():
        path.unlink()
    config |= {"eos_token_id": 151_645, "pad_token_id": 151_643}
    (directory / "config.json").write_text(json.dumps(config))
    for path in source.iterdir():
        if path.name != "config.json":
            (directory / path.name).write_bytes(path.read_bytes())


def _arguments(models: Path, run_dir: Path) -> list[str]:
    return [
        "--config",
        "configs/demo_cpu.yaml",
        "name=tiny",
        f"observe.run_dir={run_dir}",
        f"student.path={models / 'student'}",
        f"teacher.path={models / 'teacher'}",
        "data.train=[tiny_world:train:32]",
        "data.eval=[tiny_world:heldout:8]",
        "eval.teacher=false",
        "train.num_iterations=2",
        "train.train_batch_size=4",
        "train.ppo_mini_batch_size=2",
        "train.save_interval=1",
        "rollout.num_generations=2",
        "rollout.max_turns=3",
        "rollout.max_response_length=128",
        "rollout.timeout_s=200",
        "rollout.record=true",
    ]


def _wait_for(path: Path, process, log: Path, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.is_file():
        assert process.poll() is None, f"the run ended early:\n{log.read_text()[-6000:]}"
        assert time.monotonic() < deadline, f"no checkpoint yet:\n{log.read_text()[-6000:]}"
        time.sleep(0.1)


def _wait_until_gone(marker: str, timeout_s: float = 150) -> None:
    """No rank, engine, Ray or helper process of the killed run may live on; Ray's own agents take
    a minute to notice."""
    deadline = time.monotonic() + timeout_s
    while left := processes_of(marker):
        assert time.monotonic() < deadline, f"left alive: {[_command_line(p) for p in left]}"
        time.sleep(0.5)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def test_every_signal_of_the_watchdog_is_measured(finished_run):
    row = json.loads((finished_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["sandbox/level"] in (1, 2, 3)  # never L0, which must be permitted explicitly
    assert {signal.metric for signal in SIGNALS} <= row.keys()


def test_a_row_has_every_name_a_dashboard_of_the_reference_looks_for(finished_run):
    row = json.loads((finished_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(REFERENCE_NAMES) <= row.keys()
    assert {"actor/pg_loss", "actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl",
            "actor/grad_norm", "actor/token_kl/mean", "num_turns/mean", "perf/throughput",
            "timing_per_token_ms/gen", "val-aux/num_turns/mean"} <= row.keys()  # fmt: skip
    (name,) = [name for name in row if name.startswith("val-core/tiny_world/acc/mean@")]
    assert row[name] == pytest.approx(row["eval/student_success"])
    assert row["tool/calls"] == pytest.approx(
        row["rollout/tool_calls_avg"] * 8 * (1 - row["rollout/infra_error_rate"])
    )  # four prompts, two trajectories each


def test_every_scalar_of_a_run_is_explained(finished_run):
    rows = [json.loads(line) for line in (finished_run / "metrics.jsonl").open()]
    assert undocumented({name for row in rows for name in row}) == set()
