"""Resident memory of this process, as Linux counts it."""

from __future__ import annotations

from pathlib import Path


def reset_peak() -> float:
    """Resident megabytes now; the peak counter starts again from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_mb("VmRSS")


def peak_mb() -> float:
    """The most since `reset_peak`."""
    return _status_mb("VmHWM")


def _status_mb(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)
