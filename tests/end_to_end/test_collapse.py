"""A run whose rollouts collapse goes back to its last good checkpoint, and then stops.

Layer: two real ranks on recorded rollouts; no engine.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_sod.rollout.recording import Recording
from megatron_sod.types import Step
from tests.helpers import replay
from tests.helpers.launch import end, start
from tests.helpers.tiny import synthetic_trajectories

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]
OTHER_SIGNALS = (
    "warn_infra_error_rate",
    "max_malformed_rate",
    "min_response_length_share",
    "max_response_length_share",
    "min_entropy_share",
    "max_grad_norm_ratio",
    "min_step_weight",
    "max_extreme_ratio_share",
    "max_divergence_share",
    "min_teacher_mass_share",
)
CALLS = {1: 4, 2: 4, 3: 4, 4: 1, 5: 0, 6: 0, 7: 0}  # per trajectory, by iteration


def _record(folder, num_iterations: int) -> None:
    replay.write_inputs(folder, num_iterations)
    recording = Recording(folder / "recorded" / "rollouts")
    for iteration in range(1, num_iterations + 1):
        plain = synthetic_trajectories(4, 2, vocab_size=replay.VOCAB, seed=iteration)
        recording.write(iteration, [_with_calls(t, CALLS[iteration]) for t in plain])


def _with_calls(trajectory, num_calls: int):
    first, *rest = trajectory.steps
    steps = [Step(1, "ok", first.num_tokens, num_calls)]
    return replace(trajectory, steps=(*steps, *(replace(s, num_tool_calls=0) for s in rest)))


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory):
    """The run directory, what it said, and its command; it must not end well."""
    folder = tmp_path_factory.mktemp("collapse")
    _record(folder, 7)
    settings = ["watchdog.action=rollback", "watchdog.max_rollbacks=1", "train.keep_last=9"]
    settings += ["watchdog.baseline_iterations=2"]
    settings += [f"watchdog.{name}=null" for name in OTHER_SIGNALS]
    arguments = replay.arguments(folder, folder / "run", 7, *settings)
    return folder / "run", _ends_badly(arguments, folder / "log.txt"), arguments


def _ends_badly(arguments: list[str], log) -> str:
    process = start("train_sod.py", *arguments, nproc=2, log=log)
    try:
        assert process.wait(timeout=240) != 0
    finally:
        end(process)
    return log.read_text()


def _rows(run, name: str) -> dict[int, dict]:
    rows = [json.loads(line) for line in (run / name).open()]
    return {row["iteration"]: row for row in rows}


def test_the_alarm_names_what_fell_and_since_when(collapsed):
    _, log, _ = collapsed
    assert "tool calls per trajectory 0 is below 2 since iteration 4" in log
    assert "back to iteration 3 (iter_000003)" in log


def test_the_state_before_the_collapse_is_restored_exactly(collapsed):
    """The recording gives iteration 4 the same rollouts again: its numbers must be the same."""
    run, _, _ = collapsed
    taken_back, again = _rows(run, "metrics.rolled_back.jsonl"), _rows(run, "metrics.jsonl")
    assert list(taken_back) == [4, 5] and list(again) == [1, 2, 3, 4, 5]
    for iteration in (4, 5):
        for name in ("actor/loss", "actor/grad_norm", "sod/d_mean", "sod/w_mean"):
            assert taken_back[iteration][name] == again[iteration][name]


def test_after_the_last_rollback_the_run_saves_and_stops_with_what_to_do(collapsed):
    run, log, _ = collapsed
    message = next(line for line in log.splitlines() if "looks like it is collapsing" in line)
    assert "watchdog.action=warn" in message and "tools/inspect_run.py" in message
    assert (run / "checkpoints" / "latest").read_text().strip() == "iter_000005"
    rows = [json.loads(line) for line in (run / "alarms.jsonl").open()]
    assert [row.get("back_to") for row in rows] == [None, 3, None]


def test_the_same_command_stops_again_after_one_iteration_of_the_collapse(collapsed):
    run, _, arguments = collapsed
    log = _ends_badly(arguments, run.parent / "again.txt")
    assert "resumed after iteration 5" in log and "since iteration 4" in log
    assert "iteration 6: training looks like it is collapsing" in log
    assert [*_rows(run, "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
