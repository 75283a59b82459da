"""Memory, utilisation, power and temperature while an iteration runs.

A thread samples; `collect` gives what happened since the last call. Host memory is always there,
GPUs only where NVML answers: their absence is no error and makes no noise.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

GB = 1e9


class Telemetry:
    """One trainer rank's samples; the first rank of each machine also reads its GPUs."""

    def __init__(self, interval_s: float | None, *, nvml: Any = None):
        """`interval_s` None turns it off. `nvml`: stands in for the pynvml module in tests."""
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._peak: dict[str, float] = {}
        self._sums: dict[str, tuple[float, int]] = {}
        self._gpus = _Gpus(nvml) if interval_s and _is_first_on_machine() else None
        self._thread: threading.Thread | None = None
        if interval_s is not None:
            self._thread = threading.Thread(
                target=self._run, args=(interval_s,), name="telemetry", daemon=True
            )
            self._thread.start()

    def sample(self) -> None:
        """Read everything once."""
        readings = dict(self._gpus.readings()) if self._gpus else {}
        readings["memory/host_rss_gb"] = host_rss_bytes() / GB
        with self._lock:
            for name, value in readings.items():
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + value, count + 1)
                self._peak[name] = max(self._peak.get(name, value), value)

    def collect(self) -> dict[str, float]:
        """Since the last call: the highest memory and temperature, the mean of everything else."""
        if self._thread is None:
            return {}
        self.sample()
        with self._lock:
            sums, peak, self._sums, self._peak = self._sums, self._peak, {}, {}
        metrics = {
            name: peak[name] if name.endswith(("_gb", "_c")) else total / count
            for name, (total, count) in sums.items()
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            metrics["memory/cuda_allocated_peak_gb"] = torch.cuda.max_memory_allocated() / GB
            torch.cuda.reset_peak_memory_stats()
        return metrics

    def close(self) -> None:
        """Stop the thread; a second call does nothing."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        if self._gpus is not None:
            self._gpus.close()
            self._gpus = None

    def _run(self, interval_s: float) -> None:
        while not self._stop.wait(interval_s):
            self.sample()


def merge_telemetry(local: dict[str, float]) -> dict[str, float]:
    """All ranks' readings on rank 0, {} elsewhere. A collective.

    `memory/*`: the highest of any rank; `memory/host_rss_sum_gb`: all trainer ranks together.
    `gpu/<machine>.<index>/*`: as read; `memory/gpu_used_max_gb`: the fullest GPU.
    """
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(local, gathered, dst=0)
    merged: dict[str, float] = {}
    for readings in gathered or []:
        for name, value in readings.items():
            merged[name] = max(merged.get(name, value), value)
    rss = [readings.get("memory/host_rss_gb", 0.0) for readings in gathered or []]
    if any(rss):
        merged["memory/host_rss_sum_gb"] = sum(rss)
    used = [value for name, value in merged.items() if name.endswith("/memory_used_gb")]
    if used:
        merged["memory/gpu_used_max_gb"] = max(used)
    return merged


def host_rss_bytes() -> int:
    """Resident memory of this process; 0 where the platform does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _is_first_on_machine() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


class _Gpus:
    """NVML behind one iterator; a reading a GPU does not offer is left out."""

    def __init__(self, nvml: Any):
        self._nvml, self._handles = nvml, list[Any]()
        self._machine = os.environ.get("GROUP_RANK", "0")
        if nvml is None:
            try:
                self._nvml = importlib.import_module("pynvml")
            except ImportError:
                return
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlInit()
            count = self._nvml.nvmlDeviceGetCount()
            self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]

    def readings(self) -> Iterator[tuple[str, float]]:
        nvml = self._nvml
        for index, handle in enumerate(self._handles):
            # Power arrives in milliwatts.
            read: dict[str, Callable[[Any], float]] = {
                "memory_used_gb": lambda h: nvml.nvmlDeviceGetMemoryInfo(h).used / GB,
                "utilisation": lambda h: nvml.nvmlDeviceGetUtilizationRates(h).gpu / 100,
                "power_w": lambda h: nvml.nvmlDeviceGetPowerUsage(h) / 1000,
                "temperature_c": lambda h: nvml.nvmlDeviceGetTemperature(
                    h, nvml.NVML_TEMPERATURE_GPU
                ),
            }
            for name, function in read.items():
                with contextlib.suppress(nvml.NVMLError):
                    yield f"gpu/{self._machine}.{index}/{name}", float(function(handle))

    def close(self) -> None:
        if self._handles:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
