"""Constants fitted to a run give its phases back, and are used for other runs.

Layer: pure, with a metrics.jsonl written by hand. Real runs are compared in docs/planning.md.
"""

import json

import pytest

from megatron_sod.config.load import load_config, to_yaml
from megatron_sod.errors import DataError
from megatron_sod.plan.measured import comparison, read_run

SECONDS = {"rollout": 14.0, "score": 0.6, "train": 0.5, "transfer": 0.3}


def _write_run(folder, *, prompts: int, num_iterations: int = 3):
    folder.mkdir()
    config = load_config("configs/demo_cpu.yaml", [f"train.train_batch_size={prompts}"])
    (folder / "config.yaml").write_text(to_yaml(config))
    row = {
        "rollout/response_length": 100.0,
        "rollout/student_tokens": 70.0,
        "rollout/num_turns": 3.0,
        **{f"time/{phase}_s": seconds for phase, seconds in SECONDS.items()},
    }
    slow = {name: value * 10 for name, value in row.items()}  # the warm-up iteration
    rows = [slow] + [row] * (num_iterations - 1)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture(autouse=True)
def in_repository_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def test_a_run_is_read_without_its_warm_up(tmp_path):
    run = read_run(_write_run(tmp_path / "run", prompts=16))
    assert run.seconds == pytest.approx(SECONDS)
    assert run.config.plan.mean_turns == 3.0
    assert run.config.plan.observation_share == pytest.approx(0.3)


def test_fitted_constants_give_the_fitted_run_back(tmp_path):
    ((_, times),) = comparison([read_run(_write_run(tmp_path / "run", prompts=16))])
    for phase, seconds in SECONDS.items():
        assert getattr(times, f"{phase}_s") == pytest.approx(seconds, rel=0.05), phase


def test_a_larger_batch_is_predicted_from_the_smaller_one(tmp_path):
    runs = [read_run(_write_run(tmp_path / str(n), prompts=n)) for n in (16, 32)]
    (_, fitted), (_, predicted) = comparison(runs)
    assert predicted.score_s == pytest.approx(2 * fitted.score_s, rel=0.1)
    assert fitted.rollout_s < predicted.rollout_s < 2 * fitted.rollout_s


def test_tools_that_alone_would_take_longer_are_named(tmp_path):
    folder = _write_run(tmp_path / "run", prompts=16)
    config = load_config("configs/demo_cpu.yaml", ["plan.tool_latency_s=5"])
    (folder / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(DataError, match=r"tools alone.*plan\.tool_latency_s"):
        comparison([read_run(folder)])


def test_a_run_that_has_hardly_begun_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"metrics\.jsonl: 1 iteration"):
        read_run(_write_run(tmp_path / "run", prompts=16, num_iterations=1))
