"""Bounds of one run. Each is checked when it is set, so a bad value fails at setup."""

import dataclasses
import math
import os

from megatron_sod.errors import SandboxError

MIN_MEMORY_MB = 32  # below it no CPython interpreter can start
MAX_TIMEOUT_S = 3600.0


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one run may use. Times in seconds, sizes in bytes unless the name says MB.

    memory_mb bounds each process's address space and, together, the resident memory of all of
    them; the scratch directory counts apart.
    """

    timeout_s: float = 10.0
    memory_mb: int = 2048
    num_processes: int = 64
    num_files: int = 256
    file_bytes: int = 64 << 20
    scratch_bytes: int = 256 << 20
    scratch_files: int = 4096
    shm_bytes: int = 64 << 20
    stack_bytes: int = 64 << 20
    output_bytes: int = 64 << 10
    output_stop_bytes: int = 64 * (64 << 10)

    def __post_init__(self):
        if not (isinstance(self.timeout_s, int | float) and 0 < self.timeout_s <= MAX_TIMEOUT_S):
            raise SandboxError(
                f"timeout_s is {self.timeout_s!r}; it must be above 0 and at most "
                f"{MAX_TIMEOUT_S:g} seconds"
            )
        if not (isinstance(self.memory_mb, int) and MIN_MEMORY_MB <= self.memory_mb <= 1 << 24):
            raise SandboxError(
                f"memory_mb is {self.memory_mb!r}; it must be a whole number from {MIN_MEMORY_MB} "
                f"to {1 << 24}"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("timeout_s", "memory_mb") and (
                not isinstance(value, int) or value < 1
            ):
                raise SandboxError(f"{field.name} is {value!r}; it must be a whole number above 0")

    def for_guest(self):
        """The part the supervisor applies."""
        names = ("num_processes", "num_files", "file_bytes", "scratch_bytes", "scratch_files")
        values = {name: getattr(self, name) for name in (*names, "shm_bytes", "stack_bytes")}
        # The wall clock is kept by the caller; CPU time is the second net, behind what a process
        # with a thread on every CPU can use until then.
        values["cpu_s"] = math.ceil(self.timeout_s * (os.cpu_count() or 1)) + 1
        values["memory_bytes"] = self.memory_mb << 20
        return values


def check_concurrency(count):
    """Runs at the same time; None = twice the CPUs this process may use."""
    if count is None:
        return 2 * len(os.sched_getaffinity(0))
    if not isinstance(count, int) or count < 1:
        raise SandboxError(f"max_concurrency is {count!r}; it must be a whole number above 0")
    return count
