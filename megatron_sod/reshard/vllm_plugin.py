"""Loaded by vLLM in each of its processes (entry point `vllm.general_plugins`)."""

from __future__ import annotations

import multiprocessing

from megatron_sod.parallel.lifetime import die_with_parent


def register() -> None:
    """Make our weight-transfer engine known, and tie vLLM's child processes to their parent."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if "megatron_sod" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            "megatron_sod", "megatron_sod.reshard.vllm_engine", "ReshardEngine"
        )
    if multiprocessing.parent_process() is not None:
        die_with_parent()
