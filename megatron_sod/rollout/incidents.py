"""What went wrong without ending a rollout: counted for the metrics, told once in the log."""

from __future__ import annotations

import threading
from collections import Counter

_MAX_NOTES = 20


class Incidents:
    """Counts and distinct notes since they were last taken. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._notes: dict[str, None] = {}

    def count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counts[name] += number

    def note(self, text: str) -> None:
        """A line for the log; repetitions and what exceeds a page are dropped."""
        with self._lock:
            if len(self._notes) < _MAX_NOTES:
                self._notes[text] = None

    def take(self) -> tuple[Counter[str], list[str]]:
        """Everything so far, once."""
        with self._lock:
            counts, notes = self._counts, list(self._notes)
            self._counts, self._notes = Counter(), {}
        return counts, notes
