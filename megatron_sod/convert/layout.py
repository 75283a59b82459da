"""One representation of the correspondence HF tensor <-> Megatron parameter: copy segments.

A parameter of one tensor-parallel rank is a list of segments, each saying that `length` rows (or
columns) of an HF tensor are the same numbers as rows (columns) of the local parameter. Loading
copies one way, saving the other, and weight resharding intersects two layouts. Pure Python.

Layout facts (Megatron-Core 0.16):
    linear_qkv     rows (and biases) grouped per KV group: [queries of the group | key | value]
    linear_fc1     [gate | up], each split over ranks
    linear_proj, linear_fc2     split along columns
    experts        expert-parallel rank r holds experts [r * n, (r + 1) * n), numbered from 0
    word_embeddings, output_layer     rows padded to a multiple of 128 x TP; padding has no source
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Literal

from megatron_sod.errors import ModelError
from megatron_sod.model.geometry import Geometry


@dataclass(frozen=True)
class Segment:
    """`length` indices along `dim`: hf[hf_start + i] == local[local_start + i]."""

    hf_name: str
    dim: int
    hf_start: int
    local_start: int
    length: int


def overlap(
    dim: int,
    target_start: int,
    source_start: int,
    length: int,
    start: Sequence[int],
    size: Sequence[int],
) -> tuple[int, tuple[int, ...], int] | None:
    """What a segment gives to the box [start, start + size) of the tensor it is copied to.

    target[target_start + i] == source[source_start + i] along `dim`, for i < length. Returns (index
    in the box along `dim`, start in the source, length along `dim`); None where they do not meet.
    """
    begin = max(target_start, start[dim])
    end = min(target_start + length, start[dim] + size[dim])
    if begin >= end:
        return None
    there = list(start)
    there[dim] = source_start + begin - target_start
    return begin - start[dim], tuple(there), end - begin


@dataclass(frozen=True)
class _Split:
    """This rank's place among those that share tensors, and among those that share experts."""

    tp_rank: int
    tp_size: int
    ep_rank: int
    ep_size: int
    expert_tp_rank: int
    expert_tp_size: int


# Megatron names with Transformer-Engine's fused norms beside the local layers' names.
_LAYER_REPLICATED = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.router.weight": "mlp.gate.weight",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# One module per expert (SequentialMLP), or one parameter per expert (TEGroupedMLP).
_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(\d+)\.linear_fc([12])\.weight"
    r"|linear_fc([12])\.weight(\d+))"
)


@cache
def hf_shapes(geometry: Geometry) -> Mapping[str, tuple[int, ...]]:
    """Every tensor of the HF checkpoint with its shape, in file order; tied heads once."""
    hidden = geometry.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (geometry.vocab_size, hidden)
    }
    for layer in range(geometry.num_layers):
        for name, shape in {**_attention_shapes(geometry), **_mlp_shapes(geometry)}.items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not geometry.tied_embeddings:
        shapes["lm_head.weight"] = (geometry.vocab_size, hidden)
    return MappingProxyType(shapes)


def _attention_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    hidden, head = geometry.hidden_size, geometry.head_dim
    queries, keys = geometry.num_attention_heads * head, geometry.num_query_groups * head
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        shapes[f"self_attn.{name}_proj.weight"] = (rows, hidden)
        if geometry.qkv_bias:
            shapes[f"self_attn.{name}_proj.bias"] = (rows,)
    shapes["self_attn.o_proj.weight"] = (hidden, queries)
    if geometry.qk_norm:
        shapes["self_attn.q_norm.weight"] = (head,)
        shapes["self_attn.k_norm.weight"] = (head,)
    return shapes


def _mlp_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    hidden = geometry.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"post_attention_layernorm.weight": (hidden,)}
    prefixes, ffn = ["mlp."], geometry.ffn_hidden_size
    if geometry.is_moe:
        shapes["mlp.gate.weight"] = (geometry.num_experts, hidden)
        prefixes = [f"mlp.experts.{expert}." for expert in range(geometry.num_experts)]
        ffn = geometry.expert_ffn_hidden_size
    for prefix in prefixes:
        shapes[prefix + "gate_proj.weight"] = shapes[prefix + "up_proj.weight"] = (ffn, hidden)
        shapes[prefix + "down_proj.weight"] = (hidden, ffn)
    return shapes


def sharding_of(name: str) -> Literal["replicated", "tensor", "expert"]:
    """Over which ranks the Megatron parameter `name` is spread.

    "replicated": every tensor-parallel rank holds all of it; "tensor": each holds a part;
    "expert": parts lie on the expert-parallel and expert-tensor-parallel ranks.
    """
    match = _LAYER.fullmatch(name)
    if name == "decoder.final_layernorm.weight" or (match and match[2] in _LAYER_REPLICATED):
        return "replicated"
    return "expert" if match and _EXPERT.fullmatch(match[2]) else "tensor"


def segments_of(
    name: str,
    geometry: Geometry,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    ep_rank: int = 0,
    ep_size: int = 1,
    expert_tp_rank: int | None = None,
    expert_tp_size: int | None = None,
) -> list[Segment]:
    """Segments of the Megatron parameter `name` (global layer number) on one rank.

    Args:
        expert_tp_rank, expert_tp_size: the split of each expert; None: as tp_rank, tp_size.
    Raises:
        ModelError: a parameter this layout does not know.
    """
    shapes = hf_shapes(geometry)
    if name == "embedding.word_embeddings.weight":
        return _vocabulary("model.embed_tokens.weight", geometry, tp_rank, tp_size)
    if name == "output_layer.weight":
        head = "model.embed_tokens.weight" if geometry.tied_embeddings else "lm_head.weight"
        return _vocabulary(head, geometry, tp_rank, tp_size)
    if name == "decoder.final_layernorm.weight":
        return [_whole("model.norm.weight", shapes)]
    if match := _LAYER.fullmatch(name):
        split = _Split(
            tp_rank,
            tp_size,
            ep_rank,
            ep_size,
            tp_rank if expert_tp_rank is None else expert_tp_rank,
            tp_size if expert_tp_size is None else expert_tp_size,
        )
        segments = _layer(f"model.layers.{match[1]}.", match[2], geometry, split)
        if segments and all(segment.hf_name in shapes for segment in segments):
            return segments
    raise ModelError(
        f"Megatron parameter {name!r} has no Hugging Face counterpart in a {geometry.family} "
        "model; add it to megatron_sod/convert/layout.py"
    )


def _layer(prefix: str, rest: str, geometry: Geometry, split: _Split) -> list[Segment]:
    """Segments of one layer's parameter; empty for an unknown name."""
    shapes = hf_shapes(geometry)
    tp_rank, tp_size = split.tp_rank, split.tp_size
    if rest in _LAYER_REPLICATED:
        hf_name = prefix + _LAYER_REPLICATED[rest]
        return [_whole(hf_name, shapes)] if hf_name in shapes else []
    if rest == "self_attention.linear_proj.weight":
        columns = geometry.num_attention_heads * geometry.head_dim
        return [_columns(f"{prefix}self_attn.o_proj.weight", columns, tp_rank, tp_size)]
    if match := re.fullmatch(r"self_attention\.linear_qkv\.(weight|bias)", rest):
        return _qkv(prefix, match[1], geometry, tp_rank, tp_size)
    if match := re.fullmatch(r"mlp\.linear_fc([12])\.weight", rest):
        return _mlp(f"{prefix}mlp.", match[1], geometry.ffn_hidden_size, tp_rank, tp_size)
    if match := _EXPERT.fullmatch(rest):
        local, projection = match[1] or match[4], match[2] or match[3]
        expert = split.ep_rank * (geometry.num_experts // split.ep_size) + int(local)
        return _mlp(
            f"{prefix}mlp.experts.{expert}.",
            projection,
            geometry.expert_ffn_hidden_size,
            split.expert_tp_rank,
            split.expert_tp_size,
        )
    return []


def _whole(hf_name: str, shapes: Mapping[str, tuple[int, ...]]) -> Segment:
    return Segment(hf_name, 0, 0, 0, shapes[hf_name][0])


def _columns(hf_name: str, columns: int, rank: int, size: int) -> Segment:
    length = columns // size
    return Segment(hf_name, 1, rank * length, 0, length)


def _vocabulary(hf_name: str, geometry: Geometry, tp_rank: int, tp_size: int) -> list[Segment]:
    rows = geometry.padded_vocab_size(tp_size) // tp_size
    start = tp_rank * rows
    length = min(rows, geometry.vocab_size - start)
    return [Segment(hf_name, 0, start, 0, length)] if length > 0 else []


def _qkv(prefix: str, kind: str, geometry: Geometry, tp_rank: int, tp_size: int) -> list[Segment]:
    head, per_group = geometry.head_dim, geometry.heads_per_group * geometry.head_dim
    rows = geometry.num_query_groups * (per_group + 2 * head) // tp_size
    segments, first, row = [], tp_rank * rows, 0  # row: of the tensor over all ranks
    for group in range(geometry.num_query_groups):
        for name, length in (("q", per_group), ("k", head), ("v", head)):
            begin, end = max(row, first), min(row + length, first + rows)
            if begin < end:  # with more ranks than groups, ranks share a group
                hf_name = f"{prefix}self_attn.{name}_proj.{kind}"
                hf_start = group * length + begin - row
                segments.append(Segment(hf_name, 0, hf_start, begin - first, end - begin))
            row += length
    return segments


def _mlp(prefix: str, projection: str, ffn: int, rank: int, size: int) -> list[Segment]:
    """linear_fc1 (gate and up) or linear_fc2 (down) of a feed-forward block or of one expert."""
    if projection == "2":
        return [_columns(f"{prefix}down_proj.weight", ffn, rank, size)]
    length = ffn // size
    return [
        Segment(f"{prefix}{name}_proj.weight", 0, rank * length, index * length, length)
        for index, name in enumerate(("gate", "up"))
    ]
