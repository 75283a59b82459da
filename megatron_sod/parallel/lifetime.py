"""How a rank ends: with its parent, after the iteration under way, or at once.

torchrun passes SIGINT (Ctrl-C) and SIGTERM (schedulers) on to its ranks. The first asks to finish
the iteration, save and leave; a second one ends the rank at once, even inside a collective: a
thread reads the signals, since Python runs handlers only between two steps of the main thread.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Schedulers signal torchrun and its ranks, and torchrun signals the ranks: one request.
_SAME_REQUEST_S = 2.0
_AT_ONCE_CODE = 130
_CLEAN_UP_S = 8.0
# torchrun kills its ranks this long after passing a signal on; --shutdown-timeout is not visible.
_SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def die_with_parent() -> None:
    """The kernel kills this process when its parent dies. Linux only; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class StopRequest:
    """Whether someone asked this run to stop: by signal, or by creating the file `stop_file`."""

    def __init__(self, stop_file: str | Path, say: Callable[[str], None] = print):
        self.on_stop_now: list[Callable[[], None]] = []  # run before a rank ends at once
        self._stop_file, self._say = Path(stop_file), say
        self._first: float | None = None
        self._is_obeyed = False
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        threading.Thread(target=self._read, name="signals", daemon=True).start()

    def install(self) -> None:
        """Take the signals over, from whoever has them (Ray takes SIGTERM when it starts)."""
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)

    def uninstall(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def is_asked(self) -> bool:
        """Whether this rank was asked; ranks may learn it one after another."""
        return self._first is not None or self._stop_file.exists()

    def obeyed(self) -> None:
        """The run has ended as asked; the next start must not find the file."""
        self._is_obeyed = True
        if _is_main():
            self._stop_file.unlink(missing_ok=True)

    def _read(self) -> None:
        while True:
            number = os.read(self._reading, 1)[0]
            if number not in _SIGNALS:
                continue
            now, name = time.monotonic(), signal.Signals(number).name
            if self._first is None:
                self._first = now
                threading.Timer(
                    1.0, self._confirm, [name]
                ).start()  # not if a lost rank is the cause
            elif now - self._first > _SAME_REQUEST_S:
                self._stop_now(name)

    def _confirm(self, name: str) -> None:
        seconds = os.environ.get(_SHUTDOWN_TIMEOUT, "30")
        if _is_main() and not self._is_obeyed:
            self._say(
                f"{name}: finishing the iteration, then saving; once more stops at once. torchrun "
                f"leaves {seconds} s for it: set {_SHUTDOWN_TIMEOUT} or --shutdown-timeout above "
                f"the length of an iteration, or create {self._stop_file}, which has no limit"
            )

    def _stop_now(self, name: str) -> None:
        if _is_main():
            self._say(
                f"{name}, the second: stopping at once; the same command goes on from the last "
                "checkpoint"
            )
        for work in self.on_stop_now:
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            thread.join(_CLEAN_UP_S)
        os._exit(_AT_ONCE_CODE)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"
