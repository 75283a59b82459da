"""Readings of a fake NVML and of this process.

Layer: pure, then two gloo ranks for the merge. A real GPU: tests marked gpu elsewhere.
"""

import os
from types import SimpleNamespace

import pytest

from megatron_sod.observe.telemetry import Telemetry, host_rss_bytes, merge_telemetry
from tests.helpers.gloo import run_on_ranks

LONG_S = 3600.0  # the thread never samples by itself within a test


class FakeNvml:
    """Two GPUs; the second one does not tell its power."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self, *, works=True):
        self.works, self.is_shut_down = works, False
        self.used, self.busy, self.watts, self.degrees = 10e9, 50, 300.0, 40

    def nvmlInit(self):
        if not self.works:
            raise self.NVMLError("driver not loaded")

    def nvmlShutdown(self):
        self.is_shut_down = True

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=self.used * (1 + handle))

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=self.busy)

    def nvmlDeviceGetPowerUsage(self, handle):
        if handle == 1:
            raise self.NVMLError("not supported")
        return self.watts * 1000

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return self.degrees


@pytest.fixture
def nvml():
    return FakeNvml()


@pytest.fixture
def telemetry(nvml, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("GROUP_RANK", raising=False)
    telemetry = Telemetry(LONG_S, nvml=nvml)
    yield telemetry
    telemetry.close()


def test_memory_and_temperature_are_peaks_the_rest_are_means(telemetry, nvml):
    telemetry.sample()
    nvml.used, nvml.busy, nvml.watts, nvml.degrees = 4e9, 100, 500.0, 30
    metrics = telemetry.collect()
    assert metrics["gpu/0.0/memory_used_gb"] == 10.0 and metrics["gpu/0.1/memory_used_gb"] == 20.0
    assert metrics["gpu/0.0/utilisation"] == pytest.approx(0.75)
    assert metrics["gpu/0.0/power_w"] == pytest.approx(400.0)
    assert metrics["gpu/0.0/temperature_c"] == 40.0


def test_a_reading_the_gpu_does_not_offer_is_left_out(telemetry):
    metrics = telemetry.collect()
    assert "gpu/0.1/power_w" not in metrics and "gpu/0.1/temperature_c" in metrics


def test_each_collection_starts_afresh(telemetry, nvml):
    telemetry.collect()
    nvml.used = 1e9
    assert telemetry.collect()["gpu/0.0/memory_used_gb"] == 1.0


@pytest.mark.parametrize("nvml", [FakeNvml(works=False)])
def test_without_gpus_only_the_host_is_read(telemetry, nvml):
    assert set(telemetry.collect()) == {"memory/host_rss_gb"}


def test_only_the_first_rank_of_a_machine_reads_its_gpus(nvml, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    telemetry = Telemetry(LONG_S, nvml=nvml)
    assert set(telemetry.collect()) == {"memory/host_rss_gb"}
    telemetry.close()


def test_null_turns_it_off(nvml):
    telemetry = Telemetry(None, nvml=nvml)
    assert telemetry.collect() == {}
    telemetry.close()


def test_close_ends_the_thread_and_nvml(telemetry, nvml):
    telemetry.close()
    assert nvml.is_shut_down and not telemetry._thread.is_alive()
    telemetry.close()


def test_the_thread_samples_by_itself(nvml, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    telemetry = Telemetry(0.01, nvml=nvml)
    nvml.degrees = 90
    for _ in range(500):
        if telemetry._peak.get("gpu/0.0/temperature_c") == 90.0:
            break
        telemetry._stop.wait(0.01)
    nvml.degrees = 20
    assert telemetry.collect()["gpu/0.0/temperature_c"] == 90.0
    telemetry.close()


def test_host_memory_follows_what_the_process_holds():
    before = host_rss_bytes()
    held = b"\1" * 50_000_000
    grown = host_rss_bytes() - before
    assert 40_000_000 < grown < 200_000_000 and len(held) == 50_000_000


def _merge_two() -> dict | None:
    rank = int(os.environ["RANK"])
    local = {"memory/host_rss_gb": 1.0 + rank}
    if rank == 1:
        local["gpu/1.0/memory_used_gb"] = 7.0
    return merge_telemetry(local)


@pytest.mark.dist
def test_rank_zero_gets_every_machines_gpus():
    first, second = run_on_ranks(2, _merge_two)
    assert second == {}
    assert first == {
        "memory/host_rss_gb": 2.0,
        "memory/host_rss_sum_gb": 3.0,
        "gpu/1.0/memory_used_gb": 7.0,
        "memory/gpu_used_max_gb": 7.0,
    }
