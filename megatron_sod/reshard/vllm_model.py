"""vLLM's live model as the destination of a transfer.

A parameter whose live form is what the checkpoint loader fills is written in place. The others
(prepacked on CPU, padded or shuffled for a kernel) are staged, one module at a time, and handed to
vLLM's layerwise reload, which processes them and keeps the addresses CUDA graphs have captured.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    get_layerwise_info,
    make_online_process_loader,
)

from megatron_sod.errors import WeightTransferError
from megatron_sod.reshard.layouts import EngineTensor

HEAD = "lm_head.weight"


class LiveModel:
    """Implements megatron_sod.reshard.receive.Destination over a vLLM model of one worker."""

    def __init__(
        self, model: torch.nn.Module, model_config: ModelConfig, tensors: dict[str, EngineTensor]
    ):
        """
        Raises:
            WeightTransferError: the plan's parameters are not the model's.
        """
        self._model, self._model_config = model, model_config
        self.is_tied = bool(getattr(model.config, "tie_word_embeddings", False))
        self._places = _loadable_parameters(model)
        self._check(tensors)
        # module -> names of its parameters the plan fills
        self._wanted: dict[torch.nn.Module, set[str]] = {}
        for name in tensors:
            self._wanted.setdefault(self._places[name][0], set()).add(name)
        self._staged: dict[torch.nn.Module, dict[str, torch.Tensor]] = {}

    def begin(self) -> None:
        self._staged.clear()

    def open(self, tensor: EngineTensor) -> torch.Tensor:
        module, name = self._places[tensor.name]
        if not _is_live_as_loaded(module):
            return torch.zeros(tensor.shape, dtype=_load_form(module, name).dtype)
        live = getattr(module, name).data
        if tensor.parts and tensor.parts[0][1].dim == 0 and tensor.parts[0][0] is None:
            live[max(s.local_start + s.length for _, s in tensor.parts) :].zero_()
        return live

    def close(self, tensor: EngineTensor, values: torch.Tensor) -> None:
        module, name = self._places[tensor.name]
        if _is_live_as_loaded(module):
            return
        staged = self._staged.setdefault(module, {})
        staged[name] = values
        if len(staged) == len(self._wanted[module]):
            self._reload(module, self._staged.pop(module))

    def _reload(self, module: torch.nn.Module, staged: dict[str, torch.Tensor]) -> None:
        """Give vLLM's layerwise reload this worker's shards instead of whole tensors to cut."""
        initialize_layerwise_reload(module)
        loaders = {}
        for name, values in staged.items():
            parameter = getattr(module, name)
            loaders[name] = (parameter, _innermost(parameter.weight_loader))
            parameter.weight_loader = _copy_shard
            parameter.weight_loader = make_online_process_loader(module, name)
            parameter.weight_loader(parameter, values)
        finalize_layerwise_reload(module, self._model_config)
        for parameter, loader in loaders.values():
            parameter.weight_loader = loader
        _prepack_experts(module)

    def finish(self, *, refresh_tied_head: bool = True) -> None:
        """After the last parameter: what follows from others, and the proof of it."""
        if self.is_tied:
            head = self._model.lm_head
            if refresh_tied_head:
                _refresh(head)
            _check_head(head)

    def _check(self, tensors: dict[str, EngineTensor]) -> None:
        ours, theirs = set(tensors), set(self._places)
        if self.is_tied:
            theirs.discard(HEAD)
        if ours != theirs:
            raise WeightTransferError(
                f"the plan fills {len(ours)} parameters and the engine has {len(theirs)}; only in "
                f"the plan: {sorted(ours - theirs)[:3]}, only in the engine: "
                f"{sorted(theirs - ours)[:3]}; add the difference to "
                "megatron_sod/reshard/layouts.py"
            )
        for name, tensor in tensors.items():
            found = tuple(_load_form(*self._places[name]).shape)
            if found != tensor.shape:
                raise WeightTransferError(
                    f"engine parameter {name} has shape {found}, the plan has {tensor.shape}: "
                    "trainer and engine hold different models, or vLLM pads it for a kernel this "
                    "layout does not know (megatron_sod/reshard/layouts.py)"
                )


def _loadable_parameters(model: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, str]]:
    """Checkpoint-side parameter name -> (module, attribute)."""
    places = {}
    for module_name, module in model.named_modules():
        for name in get_layerwise_info(module).restore_metadata[0]:
            full = f"{module_name}.{name}".replace(".routed_experts.", ".")
            places[full] = (module, name)
    return places


def _load_form(module: torch.nn.Module, name: str) -> torch.Tensor:
    """The parameter as the loader fills it, on the meta device."""
    return get_layerwise_info(module).restore_metadata[0][name]


def _is_live_as_loaded(module: torch.nn.Module) -> bool:
    """Whether vLLM computes from the numbers as they were loaded.

    Norms have no processing at all. An embedding is looked up as it is; the copy that CPU kernels
    make of it serves the head only. Linear weights stay as loaded on GPU, not on CPU.
    """
    method = getattr(module, "quant_method", None)
    if method is None:
        return True
    if type(method) is UnquantizedEmbeddingMethod:
        return type(module).__name__ == "VocabParallelEmbedding" or _on_gpu(module)
    return type(method) is UnquantizedLinearMethod and _on_gpu(module)


def _on_gpu(module: torch.nn.Module) -> bool:
    return next(module.parameters()).device.type == "cuda"


def _copy_shard(param: torch.Tensor, shard: torch.Tensor) -> None:
    """vLLM replaces the argument named `param` when it replays the call on real memory."""
    param.data.copy_(shard)


def _innermost(loader):
    while hasattr(loader, "__wrapped__"):
        loader = loader.__wrapped__
    return loader


def _refresh(head: Any) -> None:
    """Nothing is loaded into a tied head itself, so on CPU its prepacked copy would stay old."""
    method = getattr(head, "quant_method", None)
    if method is not None:
        method.process_weights_after_loading(head)


def _prepack_experts(module: Any) -> None:
    """vLLM 0.32 runs the CPU kernel's own processing of expert weights on the first load only; a
    reload would leave them in the order of the checkpoint, which the kernel misreads."""
    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    if kernel is not None and not _on_gpu(module):
        kernel.fused_experts.process_weights_after_loading(module)


def _check_head(head: Any) -> None:
    """The tied head as it computes against the embedding it must equal, on one random row.

    Raises:
        WeightTransferError: they differ.
    """
    weight = head.weight
    generator = torch.Generator(device=weight.device).manual_seed(0)
    row = torch.randn(1, weight.shape[1], generator=generator, device=weight.device)
    row = row.to(weight.dtype)
    live = head.quant_method.apply(head, row).float()
    expected = torch.nn.functional.linear(row.float(), weight.float())
    error = float((live - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not error <= (1e-4 if weight.dtype == torch.float32 else 2e-2):
        raise WeightTransferError(
            f"{HEAD}, tied to model.embed_tokens.weight, computes something else than the "
            f"embedding (relative difference {error:.3g}): its prepacked copy is stale"
        )
