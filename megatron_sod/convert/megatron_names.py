"""Where Megatron's distributed checkpoints keep each parameter.

Layers are stacked along a first axis of one stored tensor, experts along a second, and every
tensor is stored in the shape it has without tensor parallelism:

    decoder.layers.7.mlp.linear_fc2.weight
        -> decoder.layers.mlp.linear_fc2.weight, index (7,) of [layers, hidden, ffn]
    decoder.layers.7.mlp.experts.local_experts.3.linear_fc2.weight
        -> decoder.layers.mlp.experts.experts.linear_fc2.weight, index (7, 3) of [L, E, hidden, ffn]

So a checkpoint does not depend on the layout that wrote it. Pure Python.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_sod.convert.layout import hf_shapes, segments_of, sharding_of
from megatron_sod.model.geometry import Geometry

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
# Transformer-Engine fuses a norm into the linear that follows, and local layers are stored under
# the fused names too. No linear follows the norm before a router.
_FUSED = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight"}
_FUSED_DENSE = {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}


@dataclass(frozen=True)
class Stored:
    """A parameter's place: `tensor[index]`, where `tensor` has the sizes `stack` in front."""

    key: str
    index: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()


def parameters(geometry: Geometry) -> Iterator[str]:
    """Megatron's name of every parameter, layers and experts numbered over the whole model."""
    yield "embedding.word_embeddings.weight"
    inside = ["input_layernorm.weight", "self_attention.linear_qkv.weight"]
    if geometry.qkv_bias:
        inside.append("self_attention.linear_qkv.bias")
    inside.append("self_attention.linear_proj.weight")
    if geometry.qk_norm:
        inside += ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]
    inside.append("pre_mlp_layernorm.weight")
    if geometry.is_moe:
        inside.append("mlp.router.weight")
    for expert in range(geometry.num_experts):
        prefix = f"mlp.experts.local_experts.{expert}."
        inside += [prefix + "linear_fc1.weight", prefix + "linear_fc2.weight"]
    if not geometry.is_moe:
        inside += ["mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
    for layer in range(geometry.num_layers):
        yield from (f"decoder.layers.{layer}.{name}" for name in inside)
    yield "decoder.final_layernorm.weight"
    if not geometry.tied_embeddings:
        yield "output_layer.weight"


def stored_at(name: str, geometry: Geometry) -> Stored:
    """Where the parameter `name` lies in a distributed checkpoint."""
    match = _LAYER.fullmatch(name)
    if not match:
        return Stored(name)
    layer, rest = int(match[1]), match[2]
    if expert := _EXPERT.fullmatch(rest):
        return Stored(
            f"decoder.layers.mlp.experts.experts.{expert[2]}",
            (layer, int(expert[1])),
            (geometry.num_layers, geometry.num_experts),
        )
    fused = _FUSED if geometry.is_moe else _FUSED | _FUSED_DENSE
    return Stored(f"decoder.layers.{fused.get(rest, rest)}", (layer,), (geometry.num_layers,))


def split_dim(name: str) -> int | None:
    """The dimension tensor parallelism splits; None: every rank holds the whole parameter."""
    if sharding_of(name) == "replicated":
        return None
    return 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0


def num_parts(name: str) -> int:
    """linear_fc1 is stored as all gates, then all ups, and each rank holds a piece of both."""
    return 2 if name.endswith("linear_fc1.weight") else 1


def is_vocabulary(name: str) -> bool:
    """Whether the parameter has a row per token and is padded."""
    return name in _VOCABULARY


def whole_shape(name: str, geometry: Geometry, *, tp_size: int = 1) -> tuple[int, ...]:
    """The parameter's shape without tensor parallelism; vocabulary rows padded for `tp_size`."""
    segments = segments_of(name, geometry)
    shape = list(hf_shapes(geometry)[segments[0].hf_name])
    shape[segments[0].dim] = sum(segment.length for segment in segments)
    if is_vocabulary(name):
        shape[0] = geometry.padded_vocab_size(tp_size)
    return tuple(shape)
