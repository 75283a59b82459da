"""An evaluation that infrastructure spoilt is no measurement, and training goes on.

Layer: pure; session and engines are stand-ins, the files are real. What is counted:
tests/eval/test_runner.py; real evaluations: tests/end_to_end.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("megatron_sod.eval.runner", reason="needs ray, which rollouts run on")

from megatron_sod import held_out  # noqa: E402
from megatron_sod.observe.live_view import TrainingView  # noqa: E402
from megatron_sod.observe.run_dir import RunDir  # noqa: E402
from megatron_sod.observe.summary import summarise_run, summary_lines  # noqa: E402
from megatron_sod.train.checkpoint import Progress  # noqa: E402
from megatron_sod.types import Prompt  # noqa: E402
from tests.helpers.tiny import sod_config, synthetic_trajectories  # noqa: E402
from tests.helpers.tokenizers import tiny_tokenizer  # noqa: E402

NUM_PROMPTS = 20
PLAIN = synthetic_trajectories(2, 1, vocab_size=11, seed=0)[0]


class Engines:
    """The first `num_lost` tasks call a tool that is down, the others answer rightly without."""

    def __init__(self, *num_lost: int, reason: str = "infra_error"):
        self._num_lost, self._reason = list(num_lost), reason

    def rollout(self, prompts, **options):
        num_lost = self._num_lost.pop(0)
        right = [replace(PLAIN, prompt_id=p.prompt_id, reward=1.0, score=1.0) for p in prompts]
        lost = {"finish_reason": self._reason, "reward": float("nan"), "score": float("nan")}
        return [replace(t, **(lost if i < num_lost else {})) for i, t in enumerate(right)]


class View(TrainingView):
    def __init__(self):
        self.shown = []

    def evaluated(self, model, success, interval):
        self.shown.append(success)


class Logger:
    def __init__(self):
        self.rows = []

    def log(self, iteration, scalars):
        self.rows.append(scalars)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(held_out, "from_rank0", lambda work, timeout_s: work())


def _session(folder, engines, **watchdog):
    config = sod_config(
        "s",
        "t",
        eval={"num_samples": 1},
        watchdog=watchdog,
        train={"num_iterations": 9, "eval_interval": 1},
        observe={"run_dir": str(folder / "run")},
    )
    run_dir = RunDir(config)
    run_dir.prepare(config)
    return SimpleNamespace(
        config=config,
        run_dir=run_dir,
        progress=Progress(0, 0, 0, 0, "hash"),
        eval_prompts=[Prompt(f"p:{i}", [1], "7", "tiny_world") for i in range(NUM_PROMPTS)],
        residency=SimpleNamespace(hold=lambda: None),
        tokenizer=tiny_tokenizer(),
        controller=engines,
        teacher_controller=None,
        view=View(),
        loggers=[Logger()],
    )


def _after(session, iteration):
    session.progress = replace(session.progress, iteration=iteration)
    return held_out.evaluate_if_due(session)


def test_a_loss_up_to_the_bound_is_measured_and_logged(tmp_path):
    session = _session(tmp_path, Engines(1))
    scalars = _after(session, 1)
    assert scalars["eval/student_success"] == 1.0
    assert scalars["eval/student_infra_error_rate"] == 0.05
    assert (session.progress.best_success, session.progress.best_iteration) == (1.0, 1)


@pytest.mark.parametrize("num_lost", [2, NUM_PROMPTS])
def test_above_the_bound_no_success_is_reported_and_the_best_stays(tmp_path, capfd, num_lost):
    session = _session(tmp_path, Engines(num_lost))
    session.progress = replace(session.progress, best_success=0.5, best_iteration=1)
    scalars = _after(session, 2)
    assert scalars == {"eval/student_infra_error_rate": num_lost / NUM_PROMPTS}
    assert (session.progress.best_success, session.progress.best_iteration) == (0.5, 1)
    assert session.view.shown == []
    (row,) = session.run_dir.rows("evals.jsonl")
    assert row["success"] is row["interval"] is None and row["sources"] == {}
    assert row["num_infra_errors"] == num_lost
    (line,) = capfd.readouterr().err.splitlines()
    assert f"student after iteration 2: not measured: {num_lost} of 20 trajectories" in line
    assert "watchdog.max_infra_error_rate 5%" in line and "tools/doctor.py" in line


def test_a_first_evaluation_that_is_lost_makes_nothing_best(tmp_path):
    session = _session(tmp_path, Engines(NUM_PROMPTS))
    _after(session, 1)
    assert session.progress.best_iteration is None


def test_nothing_graded_is_no_measurement_whatever_the_bound(tmp_path, capfd):
    session = _session(tmp_path, Engines(NUM_PROMPTS), max_infra_error_rate=1.0)
    assert _after(session, 1) == {"eval/student_infra_error_rate": 1.0}
    assert "not measured: none of 20 trajectories was graded" in capfd.readouterr().err


def test_a_clock_that_cuts_evaluations_is_named(tmp_path, capfd):
    _after(_session(tmp_path, Engines(9, reason="time_limit")), 1)
    assert "raise rollout.trajectory_timeout_s" in capfd.readouterr().err


def test_a_lost_evaluation_before_training_is_not_replaced_by_a_later_one(tmp_path):
    """Else the summary would call what iteration 1 reached the student before training."""
    session = _session(tmp_path, Engines(NUM_PROMPTS, 0))
    held_out.evaluate_at_start(session)
    assert session.loggers[0].rows == [{"eval/student_infra_error_rate": 1.0}]
    _after(session, 1)
    summary = summarise_run(session.run_dir, session.config, wall_s=1.0)
    assert "student_before" not in summary and summary["student_after"] == 1.0
    assert len(summary_lines(summary)) == 2
