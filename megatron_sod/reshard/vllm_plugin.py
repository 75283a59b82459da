"""Loaded by vLLM in each of its processes (entry point `vllm.general_plugins`)."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys

_PR_SET_PDEATHSIG = 1


def register() -> None:
    """Make our weight-transfer engine known, and tie vLLM's child processes to their parent."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if "megatron_sod" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            "megatron_sod", "megatron_sod.reshard.vllm_engine", "SharedPiecesEngine"
        )
    if multiprocessing.parent_process() is not None:
        die_with_parent()


def die_with_parent() -> None:
    """A killed trainer must leave no engine process behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
