"""Layers in the shape of Transformer-Engine's, which is not installed here.

The specs, the transformer layer and the experts' module are Megatron's own; only the innermost
modules are stand-ins, with the parameters and the checkpoint names that Megatron's wrappers of
Transformer-Engine give them (megatron/core/extensions/transformer_engine.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_sod.model import build
from megatron_sod.model.layers import PackedCausalAttention, RMSNorm


class Norm(RMSNorm):
    """Transformer-Engine's norms have an extra state, as its linears do."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0)

    def set_extra_state(self, state) -> None:
        pass


class NormLinear(ColumnParallelLinear):
    """As TELayerNormColumnParallelLinear: the norm's weight is the linear's."""

    def __init__(self, input_size: int, output_size: int, *, config, **options):
        super().__init__(input_size, output_size, config=config, **options)
        self.layer_norm_weight = torch.nn.Parameter(
            torch.ones(input_size, dtype=config.params_dtype)
        )


class _GroupedLinear(torch.nn.Module):
    """As TEGroupedLinear: one parameter per expert."""

    dim = 0

    def __init__(self, num_gemms, input_size, output_size, *, config, pg_collection, **_unused):
        super().__init__()
        sizes, self._num, self._groups = [output_size, input_size], num_gemms, pg_collection
        sizes[self.dim] //= pg_collection.expt_tp.size()
        for number in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(sizes, dtype=config.params_dtype))
            weight.allreduce = False  # of experts: reduced over other ranks
            self.register_parameter(f"weight{number}", weight)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        first, total = self._groups.ep.rank() * self._num, self._groups.ep.size() * self._num
        state = {}
        for number in range(self._num):
            offsets = (*sharded_offsets, (len(sharded_offsets), first + number, total))
            [value] = make_sharded_tensors_for_checkpoint(
                {"weight": getattr(self, f"weight{number}")},
                prefix,
                {"weight": self.dim},
                offsets,
                tp_group=self._groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            ).values()
            value.replica_id = (*value.replica_id[:2], self._groups.expt_dp.rank())
            state[f"{prefix}weight{number}"] = value
        return state


class ColumnGrouped(_GroupedLinear):
    dim = 0


class RowGrouped(_GroupedLinear):
    dim = 1


class _Provider(TESpecProvider):
    """What Megatron's specs ask for; whether to fuse and to group is its own answer."""

    def column_parallel_linear(self):
        return ColumnParallelLinear

    def row_parallel_linear(self):
        return RowParallelLinear

    def column_parallel_layer_norm_linear(self):
        return NormLinear

    def layer_norm(self, rms_norm=False, for_qk=False):
        return Norm

    def core_attention(self):
        return PackedCausalAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm, moe_use_legacy_grouped_gemm):
        assert moe_use_grouped_gemm and not moe_use_legacy_grouped_gemm
        return TEGroupedMLP, MLPSubmodules(linear_fc1=ColumnGrouped, linear_fc2=RowGrouped)

    def activation_func(self):
        return None


@contextlib.contextmanager
def transformer_engine_layers() -> Iterator[None]:
    """Models built inside have them. They hold weights and write checkpoints; they cannot run."""
    local = build.transformer_config

    def config(*args, **options):
        with mock.patch.object(build, "has_transformer_engine", lambda dtype: False):
            return local(*args, **options)

    with (
        mock.patch.object(gpt_layer_specs, "TESpecProvider", _Provider, create=True),
        mock.patch.object(build, "TENorm", Norm),
        mock.patch.object(build, "has_transformer_engine", lambda dtype: True),
        mock.patch.object(build, "transformer_config", config),
    ):
        yield
