"""How many parameters a rank holds, counted from the same table of tensors conversion uses."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache

from megatron_sod.config.schema import ParallelConfig
from megatron_sod.convert.layout import hf_shapes
from megatron_sod.model.geometry import Geometry
from megatron_sod.plan.roles import expert_tensor_size

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class LayerParameters:
    """Elements of one transformer layer by how they are spread over ranks."""

    replicated: int
    split: int  # over tensor-parallel ranks
    expert: int  # over expert-parallel ranks, and each expert over its tensor ranks


@dataclass(frozen=True)
class RankParameters:
    """Elements one rank holds. Experts have a data-parallel group of their own."""

    dense: int
    expert: int

    @property
    def total(self) -> int:
        return self.dense + self.expert


@cache
def layer_parameters(geometry: Geometry) -> LayerParameters:
    """Of any layer; all layers of the supported families are alike."""
    counts = {"replicated": 0, "split": 0, "expert": 0}
    for name, shape in hf_shapes(geometry).items():
        match = _LAYER.fullmatch(name)
        if match and match[1] == "0":
            counts[_kind(match[2], shape)] += math.prod(shape)
    return LayerParameters(**counts)


def _kind(name: str, shape: tuple[int, ...]) -> str:
    if ".experts." in name:
        return "expert"
    is_router = name == "mlp.gate.weight"
    is_norm = len(shape) == 1 and not name.endswith("_proj.bias")
    return "replicated" if is_router or is_norm else "split"


def rank_parameters(geometry: Geometry, parallel: ParallelConfig, pp_rank: int) -> RankParameters:
    """Elements on one rank of pipeline stage `pp_rank`, Megatron's vocabulary padding included.

    The last stage of a pipeline holds a copy of a tied head.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layer, layers = layer_parameters(geometry), geometry.num_layers // pp
    dense = layers * (layer.replicated + layer.split // tp)
    vocabulary = geometry.padded_vocab_size(tp) // tp * geometry.hidden_size
    is_first, is_last = pp_rank == 0, pp_rank == pp - 1
    if is_first:
        dense += vocabulary
    if is_last:
        dense += geometry.hidden_size  # the final norm
        if pp > 1 or not geometry.tied_embeddings:
            dense += vocabulary
    expert_ranks = parallel.expert_model_parallel_size * expert_tensor_size(parallel)
    return RankParameters(dense, layers * layer.expert // expert_ranks)


@cache
def total_parameters(geometry: Geometry) -> int:
    """Elements of the whole model, tied heads once."""
    return sum(math.prod(shape) for shape in hf_shapes(geometry).values())


def active_layer_parameters(geometry: Geometry) -> float:
    """Elements of one layer's matrices that one token meets."""
    layer = layer_parameters(geometry)
    share = geometry.experts_per_token / geometry.num_experts if geometry.is_moe else 0.0
    return layer.split + layer.expert * share
