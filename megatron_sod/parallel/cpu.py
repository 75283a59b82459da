"""Lets Megatron-Core 0.16 run on machines without CUDA, over gloo.

Megatron names the device "cuda" in its schedules, point-to-point code, optimizer and RNG tracker.
This module points those names at the CPU. It does nothing where CUDA is available, so CPU and GPU
share one code path everywhere else. Each patch names the Megatron code that needs it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
from collections.abc import Callable

import torch
import torch.distributed as dist

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange")
# Modules that write device="cuda" literally on paths a CPU run takes.
_MODULES_NAMING_CUDA = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer",
    "megatron.core.utils",
    "megatron.core.transformer.utils",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.distributed.param_and_grad_buffer",
)
_CPU_TYPE_AS_CUDA = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.DoubleTensor": "torch.cuda.FloatTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
}
_installed = False


def use_cpu_when_cuda_is_missing() -> None:
    """Install the patches once per process; a no-op on machines with CUDA."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    for name in _MODULES_NAMING_CUDA:
        importlib.import_module(name).torch = _TorchOnCpu("torch")  # type: ignore[attr-defined]
    _patch_cuda_module()
    _patch_tensor_methods()
    _patch_megatron()


def work_without_transformer_engine() -> None:
    """Megatron's router refers to a name that only Transformer-Engine defines, on GPUs too."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def device() -> torch.device:
    """The device this rank computes on."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory, which frees that of the device; itself where that is the same.

    Pinned, and copied without waiting: work queued later on this stream (a copy back to the device)
    finds it complete, the CPU only after a synchronisation.
    """
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class _TorchOnCpu(types.ModuleType):
    """`torch` as seen by one module: factories asked for "cuda" answer with CPU tensors.

    torch itself stays untouched, because transformers patches the same factories while loading.
    """

    def __getattr__(self, name: str):
        attribute = getattr(torch, name)
        return _on_cpu(attribute) if name in _FACTORIES else attribute


def _on_cpu(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def on_cpu(*args, **kwargs):
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return on_cpu


class _Stream:
    """Stands for a CUDA stream where there is none: everything is already ordered."""

    def __init__(self, *args, **kwargs): ...
    def wait_stream(self, other) -> None: ...
    def wait_event(self, event) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event=None) -> _Stream:
        return self


def _patch_cuda_module() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.Stream = _Stream  # type: ignore[misc,assignment]
    cuda.current_stream = lambda device=None: _Stream()  # type: ignore[assignment,return-value]
    cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment,return-value]
    # tensor_parallel/random.py keeps one generator state per parallel role.
    cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    cuda.get_rng_state = lambda device="cpu": torch.get_rng_state()  # type: ignore[assignment]
    cuda.set_rng_state = lambda state, device="cpu": torch.set_rng_state(state)  # type: ignore


def _patch_tensor_methods() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    original_type = torch.Tensor.type

    def type_as_megatron_expects(self, *args, **kwargs):
        # clip_grads.py and distrib_optimizer.py compare type() with torch.cuda.FloatTensor.
        if args or kwargs:
            return original_type(self, *args, **kwargs)
        name = original_type(self)
        return _CPU_TYPE_AS_CUDA.get(name, name)

    torch.Tensor.type = type_as_megatron_expects  # type: ignore[method-assign,assignment]


def _patch_megatron() -> None:
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer import attention
    from megatron.core.transformer.moe import moe_utils

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # Where Transformer-Engine can be imported: the router's product, and the split of q, k and v.
    moe_utils.te_general_gemm = attention.SplitAlongDim = None
    _patch_optimizer()
    _patch_expert_communication()


def _patch_optimizer() -> None:
    """torch's Adam and Megatron's own norm and scaling, also where Transformer-Engine or apex can
    be imported: Megatron chooses theirs then, which need CUDA."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as base

    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, True
    distrib_optimizer.HAVE_APEX_OR_TE = False
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    for module in (clip_grads, base):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale


def _patch_expert_communication() -> None:
    """Split sizes that differ between ranks, which only experts use, over gloo."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    exchange = token_dispatcher.all_to_all
    gather, reduce_scatter = (
        mappings._gather_along_first_dim,
        mappings._reduce_scatter_along_first_dim,
    )

    def all_to_all(group, tokens, output_splits=None, input_splits=None, **options):
        # The dispatcher turns split sizes into lists while it copies them off the GPU.
        splits = [
            s.tolist() if isinstance(s, torch.Tensor) else s for s in (output_splits, input_splits)
        ]
        return exchange(group, tokens, *splits, **options)

    def uneven_gather(tokens, group, splits=None, use_global_buffer=False):
        if splits is None or group.size() == 1:
            return gather(tokens, group, splits, use_global_buffer)
        longest = max(splits)  # gloo gathers equal sizes only
        padded = tokens.new_zeros(longest, *tokens.shape[1:])
        padded[: tokens.size(0)] = tokens
        parts = [torch.empty_like(padded) for _ in splits]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, splits, strict=True)])

    def uneven_reduce_scatter(tokens, group, splits=None, use_global_buffer=False):
        if splits is None or group.size() == 1:
            return reduce_scatter(tokens, group, splits, use_global_buffer)
        summed = tokens.clone()
        dist.all_reduce(summed, group=group)
        return summed.split(splits)[group.rank()]

    token_dispatcher.all_to_all = all_to_all
    mappings._gather_along_first_dim = uneven_gather
    mappings._reduce_scatter_along_first_dim = uneven_reduce_scatter
