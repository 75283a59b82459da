"""How weights find the right GPU: what can be decided without one.

Layers: arithmetic and torch's signatures. Transfers between processes: test_transports.
"""

import inspect

import pytest
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from megatron_sod.config.schema import TransferConfig
from megatron_sod.errors import WeightTransferError
from megatron_sod.model.geometry import Geometry
from megatron_sod.reshard import setup as wiring
from megatron_sod.reshard.layouts import EngineLayout, TrainerLayout
from megatron_sod.reshard.p2p import leave
from megatron_sod.reshard.setup import TransferSetup
from megatron_sod.reshard.shared_slots import _STORAGE_DEVICE, gpu_number, on_gpu_number
from tests.reshard.oracles import TINY

ENGINE_SEES = {"uuid-of-6": 0, "uuid-of-7": 1}  # CUDA_VISIBLE_DEVICES=6,7


def test_the_gpus_number_stands_where_torch_expects_it():
    assert list(inspect.signature(rebuild_cuda_tensor).parameters)[_STORAGE_DEVICE] == (
        "storage_device"
    )
    arguments = tuple(range(15))
    assert on_gpu_number(arguments, 99) == (*range(6), 99, *range(7, 15))


def test_memory_of_a_gpu_is_opened_under_the_number_it_has_here():
    assert gpu_number("uuid-of-7", ENGINE_SEES) == 1


def test_a_gpu_that_is_not_visible_is_named():
    with pytest.raises(WeightTransferError, match="uuid-of-2 is not visible.*CUDA_VISIBLE_DEVICES"):
        gpu_number("uuid-of-2", ENGINE_SEES)


@pytest.mark.parametrize(("through_host", "expected"), [(True, "cpu"), (False, "cuda")])
def test_colocated_engines_on_other_hosts_are_reached_through_host_memory(
    monkeypatch, through_host, expected
):
    """NCCL refuses a communicator in which two processes share a GPU."""
    joined = []

    def join(*_, device, **__):
        joined.append(device.type)
        raise InterruptedError

    monkeypatch.setattr(wiring, "join", join)
    setup = _setup(through_host)
    for end in (setup.sending_end, setup.receiving_end):
        with pytest.raises(InterruptedError):
            end(0, [], torch.device("cuda", 0))
    assert joined == [expected, expected]


@pytest.mark.parametrize(("device", "expected"), [("cuda", "abort"), ("cpu", "shutdown")])
def test_a_group_is_left_without_waiting_for_its_other_members(device, expected):
    """NCCL's shutdown is a collective, and an engine never closes its end first."""
    calls = []

    class Group:
        def abort(self):
            calls.append("abort")

        def shutdown(self):
            calls.append("shutdown")

    leave(Group(), torch.device(device))
    assert calls == [expected]


@pytest.mark.parametrize(
    ("given", "dtype", "expected"),
    [(None, "float32", 1e-3), (None, "bfloat16", 1.0), (0.02, "bfloat16", 0.02)],
)
def test_canaries_may_differ_by_what_the_students_dtype_rounds_away(given, dtype, expected):
    assert TransferConfig(canary_tolerance=given).tolerance(dtype) == expected


def _setup(through_host: bool) -> TransferSetup:
    return TransferSetup(
        Geometry(**TINY),
        TrainerLayout(1, TINY["num_layers"]),
        EngineLayout(1),
        dtype="float32",
        bucket_bytes=1 << 14,
        backend="p2p",
        timeout_s=1.0,
        through_host=through_host,
    )
