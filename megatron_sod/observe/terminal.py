"""Who may write on the person's terminal: this package. Everybody else's output goes to a file.

vLLM, Ray, Megatron, NCCL and the C++ runtimes write to file descriptors 1 and 2, at any time and
from any thread. While `others_into` is active those lead into a log, and `stream()` is the
terminal.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from rich.console import Console

_terminal: TextIO | None = None  # the terminal, while descriptor 2 leads elsewhere
_live: Console | None = None  # while a live view redraws itself, lines must go above it


def stream() -> TextIO:
    """Where words for the person go."""
    return _terminal if _terminal is not None else sys.stderr


def write_line(message: str) -> None:
    """One line for the person, above a live view when there is one."""
    if _live is not None:
        _live.print(message, markup=False, highlight=False, soft_wrap=True)
    else:
        print(message, file=stream(), flush=True)


def last_word(message: str) -> None:
    """One line from a thread, perhaps the last of this process: waits for no live view's lock."""
    where = stream()
    show_cursor = "\x1b[?25h" if where.isatty() else ""  # a live view hides it
    print(f"{show_cursor}{message}", file=where, flush=True)


@contextlib.contextmanager
def owned_by(console: Console) -> Iterator[None]:
    """Lines go through `console` meanwhile."""
    global _live
    _live, before = console, _live
    try:
        yield
    finally:
        _live = before


@contextlib.contextmanager
def others_into(log: Path) -> Iterator[None]:
    """Descriptors 1 and 2 of this process, and of those it starts, append to `log` meanwhile.

    An exception that leaves the block is shown on the terminal as ever.
    """
    global _terminal
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    before, _terminal = _terminal, os.fdopen(os.dup(2), "w", buffering=1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, saved in zip((1, 2), kept, strict=True):
            os.dup2(saved, descriptor)
            os.close(saved)
        _terminal.close()
        _terminal = before


def keep_worker_logs(session_logs: Path, folder: Path, *, max_bytes: int = 5_000_000) -> None:
    """Copy what Ray's workers (engines, agent loops) printed into the run's folder.

    `max_bytes`: of each file, its end; Ray's own components' logs stay where they are.
    """
    if not session_logs.is_dir():
        return
    for source in sorted([*session_logs.glob("worker-*.out"), *session_logs.glob("worker-*.err")]):
        with contextlib.suppress(OSError), source.open("rb") as file:
            size = source.stat().st_size
            file.seek(max(0, size - max_bytes))
            text = file.read()
            if _says_something(text):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / _short_name(source, text)).write_bytes(text)


def _says_something(text: bytes) -> bool:
    return any(line and not line.startswith(b":") for line in text.split(b"\n"))


def _short_name(source: Path, text: bytes) -> str:
    """Engine-477.out from worker-<56 digits>-<job>-477.out, whose text starts with
    `:actor_name:Engine`."""
    marker = b":actor_name:"
    lines = [line for line in text.split(b"\n")[:4] if line.startswith(marker)]
    actor = lines[0].removeprefix(marker).decode(errors="replace") if lines else "worker"
    safe = "".join(c if c.isalnum() else "_" for c in actor)
    return f"{safe}-{source.stem.rsplit('-', 1)[-1]}{source.suffix}"
