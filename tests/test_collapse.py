"""What is done about an alarm: said, paused on, or taken back with everything that came after.

Layer: pure; the session is a stand-in, the files are real. A real run that goes back and then
stops: tests/end_to_end/test_collapse.py; with a rollout ahead: test_overlap.py there.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from megatron_sod import collapse
from megatron_sod.errors import WatchdogAlarm
from megatron_sod.observe.run_dir import RunDir
from megatron_sod.train.checkpoint import Progress
from megatron_sod.train.checkpoint_files import complete_checkpoints, folder_name
from tests.helpers.tiny import sod_config

# Per trajectory: falls in iteration 5, noticed in 6; the last one goes on.
CALLS = [4.0, 4.0, 4.0, 4.0, 1.0, 0.5]
BATCH = 8


class Session:
    """What collapse asks of one, on rank 0; it remembers what it was told to do."""

    is_main = True

    def __init__(self, folder, saved=(), *, best=None, resumed_at=0, **watchdog):
        self.config = sod_config(
            "s", "t", watchdog=watchdog, observe={"run_dir": str(folder / "run")}
        )
        self.run_dir = RunDir(self.config)
        self.run_dir.prepare(self.config)
        self.checkpoints = SimpleNamespace(
            folder=folder / "checkpoints", finish=lambda: None, latest=self._latest
        )
        for iteration in saved:
            (self.checkpoints.folder / f"iter_{iteration:06d}").mkdir(parents=True)
        if best is not None:
            (self.checkpoints.folder / "best").write_text(f"iter_{best:06d}\n")
        self.progress = self._progress(resumed_at)
        self.run_dir.drop_after(resumed_at)
        self.watchdog, self.rollouts = None, self
        self.loaded, self.num_saves, self.num_discards, self.sent = [], 0, 0, []

    def _progress(self, iteration):
        return Progress(iteration, iteration, iteration * BATCH, iteration, "hash", 0.5, 2)

    def _latest(self):
        made = complete_checkpoints(self.checkpoints.folder)
        return made[-1] if made else None

    def load(self, path):
        self.loaded.append(path.name)
        return self._progress(int(path.name[5:]))

    def save(self):
        self.num_saves += 1
        folder = self.checkpoints.folder / folder_name(self.progress.iteration)
        folder.mkdir(parents=True, exist_ok=True)

    def discard(self):
        self.num_discards += 1

    def train(self, first, last):
        for iteration in range(first, last + 1):
            self.progress = self._progress(iteration)
            metrics = {"rollout/tool_calls_avg": CALLS[min(iteration, len(CALLS)) - 1]}
            self.run_dir.append("metrics.jsonl", {"iteration": iteration, **metrics})
            collapse.answer_alarms(self, metrics, lambda _, version: self.sent.append(version))

    @property
    def names(self):
        return sorted(path.name for path in self.checkpoints.folder.iterdir())

    def marker(self, name):
        return (self.checkpoints.folder / name).read_text().strip()


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(collapse, "from_rank0", lambda work, timeout_s: work())


def _alarms(session):
    return [json.loads(line) for line in (session.run_dir.path / "alarms.jsonl").open()]


def test_a_warning_is_said_and_written_once_and_training_goes_on(tmp_path, capfd):
    session = Session(tmp_path, [3], action="warn")
    session.train(1, 8)
    assert capfd.readouterr().err.count("tool calls per trajectory") == 1
    assert [row["iteration"] for row in _alarms(session)] == [6]
    assert not session.loaded and not session.num_saves and not session.num_discards


def test_a_pause_saves_first_and_says_what_to_do(tmp_path):
    session = Session(tmp_path, [3], action="pause")
    with pytest.raises(WatchdogAlarm, match="before iteration 5"):
        session.train(1, 6)
    assert session.num_saves == 1 and not session.loaded


def test_a_rollback_restores_the_last_good_checkpoint_and_no_prompt_comes_twice(tmp_path):
    session = Session(tmp_path, [1, 4, 5, 6], action="rollback")
    session.train(1, 6)
    assert session.loaded == ["iter_000004"], "5 is bad already, 1 is older than need be"
    progress = session.progress
    assert (progress.iteration, progress.num_optimizer_steps) == (4, 4)
    assert progress.num_prompts_drawn == 6 * BATCH, "the bad iterations' prompts are used up"
    assert session.sent == [7] == [progress.policy_version], "a version no engine has had"
    assert session.num_discards == 1, "what bad weights rolled out ahead"
    rows = session.run_dir.rows("metrics.jsonl")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    assert session.run_dir.rows("metrics.rolled_back.jsonl")[0]["iteration"] == 5
    session.train(5, 5)
    assert session.loaded == ["iter_000004"], "one bad iteration is not yet an alarm"


@pytest.mark.parametrize(("best", "kept"), [(2, "iter_000002"), (5, None)])
def test_nothing_saved_after_the_good_checkpoint_can_be_taken_for_good_later(tmp_path, best, kept):
    saved = [4, 5, 6] if kept is None else [2, 4, 5, 6]
    session = Session(tmp_path, saved, best=best, action="rollback")
    session.train(1, 6)
    assert [n for n in session.names if n.startswith("iter")] == [
        f"iter_{n:06d}" for n in saved if n <= 4
    ]
    assert session.marker("latest") == "iter_000004"
    if kept is None:
        assert "best" not in session.names, "the marked one was of the branch given up"
    else:
        assert session.marker("best") == kept


def test_after_the_last_rollback_it_pauses(tmp_path):
    session = Session(tmp_path, [4], action="rollback", max_rollbacks=1)
    session.train(1, 6)
    with pytest.raises(WatchdogAlarm):
        session.train(5, 6)
    assert session.loaded == ["iter_000004"] and session.num_saves == 1


def test_without_a_good_checkpoint_it_pauses(tmp_path):
    session = Session(tmp_path, [5, 6], action="rollback")
    with pytest.raises(WatchdogAlarm):
        session.train(1, 6)
    assert not session.loaded and session.names == ["iter_000005", "iter_000006"]


def test_the_same_command_after_a_pause_pauses_again_as_long_as_the_collapse_goes_on(tmp_path):
    with pytest.raises(WatchdogAlarm):
        Session(tmp_path, [4], action="pause").train(1, 6)
    for _ in range(3):
        again = Session(tmp_path, resumed_at=6, action="pause")
        with pytest.raises(WatchdogAlarm, match="iteration 7.*since iteration 5"):
            again.train(7, 11)
        assert again.num_saves == 0, "checkpoints of the collapse would push the good one out"
        assert again.names == ["iter_000004", "iter_000006"]


def test_a_pause_whose_cause_is_mended_trains_on_and_notices_the_next_collapse(
    tmp_path, monkeypatch
):
    with pytest.raises(WatchdogAlarm):
        Session(tmp_path, [4], action="pause").train(1, 6)
    monkeypatch.setattr(f"{__name__}.CALLS", [*CALLS, 4.0, 4.0, 0.5])
    again = Session(tmp_path, resumed_at=6, action="pause")
    with pytest.raises(WatchdogAlarm, match="iteration 10.*since iteration 9"):
        again.train(7, 11)
    assert again.num_saves == 1


def test_a_run_resumed_with_warn_does_not_repeat_what_was_said(tmp_path, capfd):
    with pytest.raises(WatchdogAlarm):
        Session(tmp_path, [4], action="pause").train(1, 6)
    capfd.readouterr()
    again = Session(tmp_path, resumed_at=6, action="warn")
    again.train(7, 11)
    assert "tool calls" not in capfd.readouterr().err and len(_alarms(again)) == 1


@pytest.mark.parametrize("resumed_at", [4, 5])
def test_iterations_done_again_are_warned_of_again(tmp_path, capfd, resumed_at):
    """What was said of them before belongs to a branch that is given up."""
    Session(tmp_path, [resumed_at], action="warn").train(1, 6)
    capfd.readouterr()
    Session(tmp_path, resumed_at=resumed_at, action="warn").train(resumed_at + 1, 8)
    assert capfd.readouterr().err.count("since iteration 5") == 1


def test_a_run_resumed_in_a_collapse_with_rollback_goes_back_and_not_for_ever(tmp_path):
    with pytest.raises(WatchdogAlarm):
        Session(tmp_path, [4], action="pause").train(1, 6)
    again = Session(tmp_path, resumed_at=6, action="rollback", max_rollbacks=2)
    again.train(7, 7)
    assert again.loaded == ["iter_000004"] and again.progress.iteration == 4
    again.train(5, 6)
    assert again.loaded == ["iter_000004"] * 2
    with pytest.raises(WatchdogAlarm):
        again.train(5, 6)
    after = Session(tmp_path, resumed_at=6, action="rollback", max_rollbacks=2)
    with pytest.raises(WatchdogAlarm):
        after.train(7, 7)
    assert not after.loaded, "the process before has used up the rollbacks"
