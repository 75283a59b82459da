"""A job that cannot go on ends within the timeout, names the rank, and leaves files that say why.

Layers: two real processes over gloo without Megatron. What is concluded from the records alone:
test_diagnosis; the whole trainer under torchrun: tests/end_to_end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.gloo import free_port
from tests.helpers.launch import ROOT
from tests.helpers.watched_rank import STALL_TIMEOUT_S

pytestmark = pytest.mark.dist
_WORLD = 2


@dataclass
class Ended:
    codes: list[int | None]  # None: still there after the deadline
    text: str
    files: dict[str, str]  # of RUN/stall
    wall_s: float


def run_job(folder: Path, kind: str, deadline_s: float = 60) -> Ended:
    environment = {
        **os.environ,
        "WORLD_SIZE": str(_WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    log, started = folder / "log", time.monotonic()
    with log.open("w") as output:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.watched_rank", str(folder / "run"), kind],
                cwd=ROOT,
                env={**environment, "RANK": str(rank)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for rank in range(_WORLD)
        ]
        codes: list[int | None] = []
        for rank in ranks:
            try:
                left = deadline_s - (time.monotonic() - started)
                codes.append(rank.wait(timeout=max(left, 0.1)))
            except subprocess.TimeoutExpired:
                codes.append(None)
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
    files = {path.name: path.read_text() for path in (folder / "run" / "stall").glob("*")}
    return Ended(codes, log.read_text(), files, time.monotonic() - started)


def messages(ended: Ended) -> list[str]:
    return [line for line in ended.text.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("stopped", " s: stopped, or its machine is lost"),
        ("killed", "died: its process is gone"),
        ("busy", "no rank has moved for 3 s: the others wait for rank 1 "),
    ],
)
def test_the_rank_that_holds_the_job_up_is_named_and_nothing_is_left(tmp_path, kind, says):
    ended = run_job(tmp_path, kind)
    assert None not in ended.codes and 0 not in ended.codes, f"{ended.codes}\n{ended.text}"
    message, *_ = messages(ended)  # on a busy machine a second rank may say it too
    assert "rank 1 (pid" in message and "rank 0 (pid" not in message, message
    assert says in message and "iteration 3, train, micro-batch 1/2" in message, message
    assert "last collective all_reduce float32[4] #3" in message, message  # a barrier, two rounds
    table = ended.files["ranks.txt"]
    assert table.count("\nrank ") == _WORLD and message.split("; the job")[0][7:] in table
    assert "in main" in ended.files["rank_0000.txt"], "the stack of the waiting rank"
    assert ("rank_0001.txt" in ended.files) == (kind == "busy"), "the others cannot write"


def test_a_collective_mismatch_is_said_and_does_not_hang(tmp_path):
    ended = run_job(tmp_path, "mismatch")
    assert None not in ended.codes and 0 not in ended.codes, f"{ended.codes}\n{ended.text}"
    said = messages(ended)  # on a busy machine a second rank may say it too
    assert said, ended.text
    assert "rank 1" in said[0] and "broadcast int64[8]" in said[0], said[0]


def test_silence_that_was_announced_is_not_a_stall(tmp_path):
    ended = run_job(tmp_path, "patient")
    assert ended.codes == [0] * _WORLD, ended.text
    assert ended.wall_s > 2 * STALL_TIMEOUT_S and not ended.files
    heartbeat = (tmp_path / "run" / "heartbeat.log").read_text()
    assert "iteration" in heartbeat and "quietest of 2: rank" in heartbeat


def test_a_rank_that_ends_with_an_error_of_its_own_gets_no_second_message(tmp_path):
    ended = run_job(tmp_path, "own_error")
    assert None not in ended.codes and 0 not in ended.codes, f"{ended.codes}\n{ended.text}"
    assert messages(ended) == [] and "the engine is on fire" in ended.text
