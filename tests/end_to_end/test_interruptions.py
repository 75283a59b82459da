"""Runs that are killed, stopped, frozen or asked to end: nothing is lost, counted twice or left.

Layers: torchrun with two real trainer ranks on recorded rollouts, without engines. With a live
engine: test_tiny_run. The watch and the checkpoints by themselves: tests/parallel, tests/train.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.helpers import replay
from tests.helpers.launch import end, marker_of, processes_of, ranks_of, run, start

pytestmark = [pytest.mark.dist, pytest.mark.timeout(1800)]
_STALL_TIMEOUT_S = 10


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    replay.write_inputs(folder, 20)
    return folder


@pytest.mark.parametrize(
    ("num_iterations", "num_kills"),
    [(5, 2), pytest.param(20, 10, marks=pytest.mark.slow)],
)
def test_a_run_killed_at_random_moments_ends_bit_equal_to_an_undisturbed_one(
    inputs, tmp_path, num_iterations, num_kills
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = replay.arguments(inputs, whole, num_iterations)
    run("train_sod.py", *arguments, nproc=2, log=tmp_path / "whole.log", timeout_s=280)
    rng = random.Random(num_kills)
    arguments = replay.arguments(inputs, killed, num_iterations)
    moments = []
    for number in range(num_kills):
        in_save = number % 2 == 0
        log = tmp_path / f"{number}.log"
        moments.append(_kill_once(arguments, killed, log, rng, in_save=in_save))
    log = run("train_sod.py", *arguments, nproc=2, log=tmp_path / "last.log", timeout_s=280)
    assert "resumed after iteration" in log, f"killed {moments}"
    assert "while saving" in moments, f"killed {moments}: the test says little"
    (rows, weights), (expected_rows, expected_weights) = map(replay.outcome, (killed, whole))
    assert [row["iteration"] for row in rows] == list(range(1, num_iterations + 1))
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row == expected, f"iteration {row['iteration']}"
    assert weights == expected_weights
    names = sorted(path.name for path in (killed / "checkpoints").iterdir())
    last = [f"iter_{n:06d}" for n in (num_iterations - 1, num_iterations)]
    assert [n for n in names if n.startswith("iter")] == last, "two kept, none half-written"


def test_a_stop_file_ends_the_run_after_the_iteration_with_everything_saved(inputs, tmp_path):
    process, log, run_dir = _started(inputs, tmp_path, 20)
    try:
        (run_dir / "stop").touch()
        assert process.wait(timeout=60) == 0, log.read_text()[-3000:]
    finally:
        end(process)
    _assert_stopped(log, run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_to_torchrun_finishes_the_iteration_and_saves(inputs, tmp_path, number):
    process, log, run_dir = _started(inputs, tmp_path, 20)
    try:
        process.send_signal(number)
        process.wait(timeout=60)  # torchrun itself always reports the signal as a failure
    finally:
        end(process)
    assert f"{number.name}: finishing the iteration" in log.read_text() or (
        "stopped as asked" in log.read_text()
    )
    _assert_stopped(log, run_dir)


@pytest.mark.slow
def test_a_second_signal_stops_at_once(inputs, tmp_path):
    process, log, run_dir = _started(inputs, tmp_path, 20)
    try:
        for pid in ranks_of(log).values():
            os.kill(pid, signal.SIGSTOP)  # an iteration that does not end
        process.send_signal(signal.SIGINT)
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        for pid in ranks_of(log).values():
            os.kill(pid, signal.SIGCONT)
        process.wait(timeout=60)
    finally:
        end(process)
    assert processes_of(marker_of(log)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "rank", "says"),
    [
        (signal.SIGSTOP, 1, "stopped, or its machine is lost"),
        (signal.SIGSTOP, 0, "stopped, or its machine is lost"),
        (signal.SIGKILL, 1, "died: its process is gone"),
        (signal.SIGKILL, 0, "died: its process is gone"),
    ],
)
def test_a_frozen_or_dead_rank_ends_the_job_with_its_name(inputs, tmp_path, number, rank, says):
    process, log, run_dir = _started(inputs, tmp_path, 20)
    try:
        began = time.monotonic()
        os.kill(ranks_of(log)[rank], number)
        assert process.wait(timeout=90) != 0
        took_s = time.monotonic() - began
    finally:
        end(process)
    lines = [line for line in log.read_text().splitlines() if line.startswith("error")]
    assert len(lines) == 1 and f"rank {rank} (pid" in lines[0] and says in lines[0], lines
    assert lines[0].split("; the job")[0][7:] in (run_dir / "stall" / "ranks.txt").read_text()
    assert took_s < _STALL_TIMEOUT_S + 30, "the message within the timeout, torchrun after it"
    assert processes_of(marker_of(log)) == []


def _started(inputs: Path, folder: Path, num_iterations: int):
    """A run that has its first checkpoint."""
    run_dir, log = folder / "run", folder / "log"
    arguments = replay.arguments(
        inputs, run_dir, num_iterations, f"observe.stall_timeout_s={_STALL_TIMEOUT_S}"
    )
    process = start("train_sod.py", *arguments, nproc=2, log=log)
    _wait(process, log, (run_dir / "checkpoints" / "latest").is_file)
    return process, log, run_dir


def _kill_once(
    arguments: list[str], run_dir: Path, log: Path, rng: random.Random, *, in_save: bool
) -> str:
    """Start, wait for a moment of the first new iterations, SIGKILL one rank or all.

    Returns when it was: a save that was cut off leaves its half-written folder.
    """
    saves = run_dir / "checkpoints"
    done = _latest(saves)
    process = start("train_sod.py", *arguments, nproc=2, log=log)
    try:
        _wait(process, log, lambda: len(ranks_of(log)) == 2)
        ranks = ranks_of(log)
        chosen = list(ranks.values()) if rng.random() < 0.5 else [rng.choice(list(ranks.values()))]
        for stale in saves.glob("iter_*.partial"):  # of the kill before; the run would clear it
            shutil.rmtree(stale)
        if in_save:
            _wait(process, log, lambda: any(saves.glob("iter_*.partial")), poll_s=0.001)
            time.sleep(rng.uniform(0, 0.02))
        else:
            _wait(process, log, lambda: _latest(saves) != done, poll_s=0.01)
            time.sleep(rng.uniform(0, 0.6))
        for pid in chosen:
            os.kill(pid, signal.SIGKILL)
        process.wait(timeout=90)
        deadline = time.monotonic() + 30
        while left := processes_of(marker_of(log)):
            assert time.monotonic() < deadline, f"left alive: {left}"
            time.sleep(0.1)
    finally:
        end(process)
    return "while saving" if any(saves.glob("iter_*.partial")) else "in an iteration"


def _latest(saves: Path) -> str:
    marker = saves / "latest"
    return marker.read_text() if marker.is_file() else ""


def _wait(process, log: Path, condition, *, poll_s: float = 0.05, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"the run ended early:\n{log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"not in time:\n{log.read_text()[-4000:]}"
        time.sleep(poll_s)


def _assert_stopped(log: Path, run_dir: Path) -> None:
    text = log.read_text()
    assert "stopped as asked after iteration" in text, text[-3000:]
    iteration = int(text.split("stopped as asked after iteration ")[1].split(",")[0])
    assert (run_dir / "checkpoints" / "latest").read_text() == f"iter_{iteration:06d}\n"
    rows = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == iteration < 20
    assert not (run_dir / "stop").exists()
    assert processes_of(marker_of(log)) == []
