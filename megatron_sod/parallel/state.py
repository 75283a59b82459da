"""Start torch.distributed and Megatron's process groups from the environment torchrun sets."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sod.config.schema import ParallelConfig
from megatron_sod.errors import ConfigError
from megatron_sod.parallel.cpu import (
    use_cpu_when_cuda_is_missing,
    work_without_transformer_engine,
)

DEFAULT_TIMEOUT_S = 600


def initialize(parallel: ParallelConfig, *, seed: int, timeout_s: int = DEFAULT_TIMEOUT_S) -> None:
    """Start the default process group and Megatron's groups for `parallel`.

    Raises:
        ConfigError: the world size is not a multiple of the model-parallel size.
    """
    use_cpu_when_cuda_is_missing()
    work_without_transformer_engine()
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    _initialize_groups(parallel)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _initialize_groups(parallel: ParallelConfig) -> None:
    world_size = dist.get_world_size()
    if world_size % parallel.model_parallel_size:
        raise ConfigError(
            f"world size {world_size} is not a multiple of tensor x pipeline x context parallel "
            f"size {parallel.model_parallel_size}; start torchrun with --nproc-per-node "
            f"{parallel.model_parallel_size} or change the model's `parallel` section"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tp_size,
        create_gloo_process_groups=False,
    )


def process_groups() -> ProcessGroupCollection:
    """The groups of this rank, to be passed to whatever communicates."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.megatron_globals = _globals()
    return groups


def further_groups(parallel: ParallelConfig) -> ProcessGroupCollection:
    """Groups of a second model over the same ranks; the first model's stay the default."""
    first = _globals()
    parallel_state.destroy_model_parallel()  # forgets the groups, does not close them
    try:
        _initialize_groups(parallel)
        return process_groups()
    finally:
        _set_globals(first)


@contextlib.contextmanager
def own_groups(groups: ProcessGroupCollection) -> Iterator[None]:
    """Megatron's global state shows the groups of the model at hand.

    Most of Megatron takes its groups as arguments; the schedules' defaults, checkpoints and parts
    of the layers still ask the global state.
    """
    before = _globals()
    _set_globals(groups.megatron_globals)
    try:
        yield
    finally:
        _set_globals(before)


def _globals() -> dict[str, Any]:
    names = [name for name in vars(parallel_state) if name.startswith("_") and name.isupper()]
    return {name: getattr(parallel_state, name) for name in names}


def _set_globals(values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(parallel_state, name, value)


def release_groups() -> None:
    """Close the groups of the default model, with the threads and sockets they hold; the default
    process group stays. A collective. For programs that go through several layouts."""
    groups = {
        id(value): value
        for value in _globals().values()
        if isinstance(value, dist.ProcessGroup) and value is not dist.group.WORLD
    }
    parallel_state.destroy_model_parallel()
    for group in groups.values():
        dist.destroy_process_group(group)


def machines(ranks_per_machine: int) -> list[str]:
    """Host names in the order of the ranks. A collective."""
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts[::ranks_per_machine]


def shutdown() -> None:
    """Leave every group; safe to call twice."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def shutdown_unless_failed(kind, error: BaseException | None, traceback) -> None:
    """`shutdown`, as an exit of a context. After an error NCCL's groups are left as they are: to
    close one waits for all of its ranks, and those inside a collective never come; the error's
    message would wait too."""
    if error is None or not torch.cuda.is_available():
        shutdown()


def is_last_stage(groups: ProcessGroupCollection) -> bool:
    """Whether this rank holds the output head."""
    return groups.pp.rank() == groups.pp.size() - 1
