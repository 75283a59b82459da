"""One representation of the correspondence HF tensor <-> Megatron parameter: copy segments.

A parameter of one tensor-parallel rank is a list of segments, each saying that `length` rows (or
columns) of an HF tensor are the same numbers as rows (columns) of the local parameter. Loading
copies one way, saving the other, and weight resharding intersects two layouts. Pure Python.

Layout facts (Megatron-Core 0.16):
    linear_qkv     rows grouped per KV group: [queries of the group | key | value]
    linear_fc1     [gate | up], each split over ranks
    linear_proj, linear_fc2     split along columns
    word_embeddings, output_layer     rows padded to a multiple of 128 x TP; padding has no source
"""

from __future__ import annotations

import re
from dataclasses import dataclass

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


# Megatron names with Transformer-Engine's fused norms beside the local layers' names.
_LAYER_REPLICATED = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
_LAYER_COLUMNS = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def hf_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Every tensor of the HF checkpoint with its shape, in file order; tied heads once."""
    hidden, ffn, head = geometry.hidden_size, geometry.ffn_hidden_size, geometry.head_dim
    queries, keys = geometry.num_attention_heads * head, geometry.num_query_groups * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (geometry.vocab_size, hidden)
    }
    for layer in range(geometry.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, queries)
        if geometry.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (head,)
            shapes[prefix + "self_attn.k_norm.weight"] = (head,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (ffn, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, ffn)
    shapes["model.norm.weight"] = (hidden,)
    if not geometry.tied_embeddings:
        shapes["lm_head.weight"] = (geometry.vocab_size, hidden)
    return shapes


def segments_of(
    name: str, geometry: Geometry, *, tp_rank: int = 0, tp_size: int = 1
) -> list[Segment]:
    """Segments of the Megatron parameter `name` (global layer number) on one TP rank.

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
        prefix, rest = f"model.layers.{match[1]}.", match[2]
        if rest in _LAYER_REPLICATED:
            return [_whole(prefix + _LAYER_REPLICATED[rest], shapes)]
        if rest in _LAYER_COLUMNS:
            hf_name = prefix + _LAYER_COLUMNS[rest]
            length = shapes[hf_name][1] // tp_size
            return [Segment(hf_name, 1, tp_rank * length, 0, length)]
        if rest == "self_attention.linear_qkv.weight":
            return _qkv(prefix, geometry, tp_rank, tp_size)
        if rest == "mlp.linear_fc1.weight":
            return _gate_up(prefix, geometry, tp_rank, tp_size)
    raise ModelError(
        f"Megatron parameter {name!r} has no Hugging Face counterpart; add it to "
        "megatron_sod/convert/layout.py"
    )


def _whole(hf_name: str, shapes: dict[str, tuple[int, ...]]) -> Segment:
    return Segment(hf_name, 0, 0, 0, shapes[hf_name][0])


def _vocabulary(hf_name: str, geometry: Geometry, tp_rank: int, tp_size: int) -> list[Segment]:
    rows = geometry.padded_vocab_size(tp_size) // tp_size
    start = tp_rank * rows
    length = min(rows, geometry.vocab_size - start)
    return [Segment(hf_name, 0, start, 0, length)] if length > 0 else []


def _qkv(prefix: str, geometry: Geometry, tp_rank: int, tp_size: int) -> list[Segment]:
    head, per_group = geometry.head_dim, geometry.heads_per_group * geometry.head_dim
    groups = geometry.num_query_groups // tp_size
    segments = []
    for local_group in range(groups):
        group, row = tp_rank * groups + local_group, local_group * (per_group + 2 * head)
        for name, length in (("q", per_group), ("k", head), ("v", head)):
            hf_name = f"{prefix}self_attn.{name}_proj.weight"
            segments.append(Segment(hf_name, 0, group * length, row, length))
            row += length
    return segments


def _gate_up(prefix: str, geometry: Geometry, tp_rank: int, tp_size: int) -> list[Segment]:
    length = geometry.ffn_hidden_size // tp_size
    return [
        Segment(f"{prefix}mlp.{name}_proj.weight", 0, tp_rank * length, index * length, length)
        for index, name in enumerate(("gate", "up"))
    ]
