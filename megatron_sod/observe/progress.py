"""Progress that works in both places: a live bar on a terminal, plain periodic lines in a file."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_sod.observe import terminal

LINE_EVERY_S = 5.0


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def say(message: str) -> None:
    """One line for the person watching; printed by rank 0 only."""
    if is_main_process():
        terminal.write_line(message)


class _Silent:
    def update(self, done: int, **values: float | str) -> None: ...


class Lines(_Silent):
    """A line every few seconds, and one at the end: for files and pipes."""

    def __init__(self, title: str, total: int, unit: str, start: int):
        self._title, self._total, self._unit, self._start = title, total, unit, start
        self._started = self._last = time.monotonic()

    def update(self, done: int, **values: float | str) -> None:
        now = time.monotonic()
        if now - self._last < LINE_EVERY_S and done < self._total:
            return
        self._last = now
        eta = (now - self._started) / max(done - self._start, 1) * (self._total - done)
        say(
            f"{self._title}: {self._unit} {done}/{self._total}, {_join(values)}"
            f"{'; ' if values else ''}{eta:.0f} s left"
        )


class _Bar(_Silent):
    def __init__(self, bar: Progress, title: str, total: int, start: int):
        self._bar = bar
        self._task = bar.add_task(title, total=total, completed=start, values="")

    def update(self, done: int, **values: float | str) -> None:
        self._bar.update(self._task, completed=done, values=_join(values))


def _join(values: dict[str, float | str]) -> str:
    return ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()
    )


@contextlib.contextmanager
def progress(title: str, total: int, *, unit: str = "item", start: int = 0) -> Iterator[_Silent]:
    """Yields an object with `update(done, **values)`; only rank 0 shows anything.

    `start`: how many were done before, in a run that is resumed.
    """
    if not is_main_process():
        yield _Silent()
    elif not terminal.stream().isatty():
        yield Lines(title, total, unit, start)
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
        )
        console = Console(file=terminal.stream())
        with Progress(*columns, console=console) as bar, terminal.owned_by(console):
            yield _Bar(bar, title, total, start)
