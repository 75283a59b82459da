"""A thread per rank that sees when the job is stuck, says which rank it waits for, and ends it.

Ranks publish their Status on a torch store of their own connection, several times per timeout. When
a rank is gone, silent, or nobody moves, every living rank writes its stacks to RUN/stall/, the
lowest one says one message, and all exit. The lowest rank also keeps RUN/heartbeat.log.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_sod.errors import SodError
from megatron_sod.parallel.collectives import note_collectives
from megatron_sod.parallel.diagnosis import Verdict, as_table, describe, diagnose
from megatron_sod.parallel.status import STATUS

_KEY = "megatron_sod/status/"
_HEARTBEAT_EVERY_S = 10.0
_LEAVE_TO_REPORTER_S = 3.0  # the others exit later, so that the message comes first
_CLEAN_UP_S = 8.0
_START_PATIENCE_S = 3600.0


class Watch:
    """Constructed by all ranks together; `close` ends the thread."""

    def __init__(
        self,
        run_dir: str | Path,
        *,
        stall_timeout_s: float,
        say: Callable[[str], None] = print,
    ):
        """`say` shows the person one line."""
        self._run_dir, self._timeout_s, self._say = Path(run_dir), stall_timeout_s, say
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._store = _get_default_store().clone()  # type: ignore[attr-defined]
        self._interval_s = min(1.0, stall_timeout_s / 10)
        self._started = time.time()  # by the clock files carry
        self._heard: dict[int, tuple[int, float]] = {}  # rank -> (beat, when it was first seen)
        self._texts: list[bytes] = []
        self._beat, self._last_line = 0, 0.0
        self._closed = threading.Event()
        self._closing = threading.Lock()
        self.on_abort: list[Callable[[], object]] = []  # run before this rank exits
        self._patience = contextlib.ExitStack()  # engines and models start in silence
        self._patience.enter_context(STATUS.may_take(_START_PATIENCE_S))
        note_collectives()
        STATUS.touch()
        self._publish()
        dist.barrier()  # every rank has a record from here on
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Tell the others that this rank leaves on purpose, or after an error of its own."""
        if STATUS.state == "running":
            STATUS.state = "ended"
        self._closed.set()
        self._thread.join(timeout=5)
        self._publish()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The start is over: silence counts from here. An error that a lost rank causes inside is
        reported as the loss of that rank."""
        self._patience.close()
        try:
            yield
        except SodError:
            STATUS.fail()
            raise
        except Exception:
            STATUS.fail()
            # The watching thread needs a moment to see that a process is gone; it then exits.
            deadline = time.monotonic() + 5 * self._interval_s + 2.0
            while time.monotonic() < deadline:
                verdict = self._verdict()
                if verdict is not None and not verdict.is_expected:
                    self._abort(verdict)
                time.sleep(self._interval_s / 2)
            raise

    def _run(self) -> None:
        while not self._closed.wait(self._interval_s):
            self._publish()
            verdict = self._verdict() if self._is_looking() else None
            if verdict is not None and not self._closed.is_set():
                self._abort(verdict)

    def _publish(self) -> None:
        self._beat += 1
        record = {**STATUS.snapshot(), "beat": self._beat}
        with contextlib.suppress(RuntimeError):  # the store's host is gone; `_table` copes
            self._store.set(f"{_KEY}{self._rank}", json.dumps(record))

    def _is_looking(self) -> bool:
        """Reading all records costs; ranks that move leave it to rank 0 and its neighbours."""
        quiet = STATUS.snapshot()["quiet_s"] > self._timeout_s / 4
        return quiet or self._rank < 2 or self._world <= 8

    def _verdict(self) -> Verdict | None:
        table = self._table()
        verdict = diagnose(table, stall_timeout_s=self._timeout_s)
        reporter = self._reporter(table, verdict)
        if verdict is None and self._rank == reporter:
            self._heartbeat(table)
        return verdict

    def _table(self) -> list[dict[str, Any]]:
        now, own = time.monotonic(), STATUS.snapshot()
        with contextlib.suppress(RuntimeError):  # the store's host is gone: the last records serve
            self._texts = self._store.multi_get([f"{_KEY}{r}" for r in range(self._world)])
        table = []
        for rank, text in enumerate(self._texts):
            record = json.loads(text)
            beat, since = self._heard.get(rank, (-1, now))
            if record["beat"] != beat:
                since = now
                self._heard[rank] = record["beat"], now
            elapsed = now - since
            record["unheard_s"] = elapsed
            record["quiet_s"] += elapsed
            record["patience_s"] = max(record["patience_s"] - elapsed, 0.0)
            is_near = all(record[key] == own[key] for key in ("host", "pid_space"))
            record["is_gone"] = _is_gone(record["pid"]) if is_near else None
            table.append(record)
        return table

    def _reporter(self, table: list[dict[str, Any]], verdict: Verdict | None) -> int:
        """The lowest rank that can speak."""
        blamed = verdict.ranks if verdict is not None else ()
        able = [
            rank
            for rank, record in enumerate(table)
            if not record["is_gone"] and record["unheard_s"] <= self._timeout_s
        ]
        return min((r for r in able if r not in blamed), default=min(able, default=self._rank))

    def _heartbeat(self, table: list[dict[str, Any]]) -> None:
        now = time.monotonic()
        if now - self._last_line < _HEARTBEAT_EVERY_S:
            return
        self._last_line = now
        quietest = max(range(self._world), key=lambda rank: table[rank]["quiet_s"])
        line = (
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}  rank {self._rank}: "
            f"{describe(table[self._rank])}; quietest of {self._world}: rank {quietest}, "
            f"{table[quietest]['quiet_s']:.0f} s, {table[quietest]['phase']}\n"
        )
        with contextlib.suppress(OSError):  # a full disk is the checkpoint's to report
            self._run_dir.mkdir(parents=True, exist_ok=True)
            with (self._run_dir / "heartbeat.log").open("a") as file:
                file.write(line)

    def _abort(self, verdict: Verdict) -> NoReturn:
        """Write what is known, say it once, end this rank and what is stopped on this machine."""
        with self._closing:  # the main thread may arrive here too
            table = self._table()
            folder = self._run_dir / "stall"
            with contextlib.suppress(OSError):
                self._write_stacks(folder)
            if self._must_say(verdict, table, folder / "ranks.txt"):
                self._fail()
                with contextlib.suppress(OSError):
                    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {verdict.message}\n"
                    (folder / "ranks.txt").write_text(text + as_table(table))
                self._say(
                    f"error: {verdict.message}; the job ends. What every rank was doing is in "
                    f"{folder}; the same command goes on from the last checkpoint"
                )
            self._clean_up()
            _kill_stopped(table, verdict.ranks)
            sys.stdout.flush()
            os._exit(1)

    def _must_say(self, verdict: Verdict, table: list[dict[str, Any]], said: Path) -> bool:
        """Whether it is this rank that tells the person. The others wait here, so that the message
        comes before they exit, and take it over when the reporter has said nothing by then. Until
        one has, this rank goes on as running: a rank that counts as failed is not looked at."""
        if self._rank == self._reporter(table, verdict) and not verdict.is_expected:
            return not self._is_reported(said)
        deadline = time.monotonic() + _LEAVE_TO_REPORTER_S
        while time.monotonic() < deadline:
            if verdict.is_expected or self._is_reported(said):
                self._fail()
            else:
                self._publish()
            time.sleep(min(self._interval_s, 0.1))
        return not verdict.is_expected and not self._is_reported(said)

    def _fail(self) -> None:
        """This rank's own end needs no message of the others."""
        STATUS.fail()
        self._publish()

    def _is_reported(self, table: Path) -> bool:
        """Whether a rank of this job has said already why it ends."""
        try:
            return table.stat().st_mtime >= self._started
        except OSError:
            return False

    def _write_stacks(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank_{self._rank:04d}.txt").open("w") as file:
            file.write(json.dumps(STATUS.snapshot()) + "\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _clean_up(self) -> None:
        for work in self.on_abort:
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            thread.join(_CLEAN_UP_S)


def _is_gone(pid: int) -> bool:
    """Whether a process of this machine has ended; a zombie has."""
    return _state_of(pid) in ("", "Z", "X")


def _kill_stopped(table: list[dict[str, Any]], blamed: tuple[int, ...]) -> None:
    """A stopped process takes no SIGTERM; torchrun would wait half a minute before SIGKILL."""
    for rank in blamed:
        if rank < len(table) and table[rank]["is_gone"] is False:
            pid = table[rank]["pid"]
            if pid != os.getpid() and _state_of(pid) in ("T", "t"):
                os.kill(pid, signal.SIGKILL)


def _state_of(pid: int) -> str:
    """The kernel's letter: R, S, T (stopped), Z ...; empty when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""
