"""Who holds what: the trainer's ranks on one side, vLLM's tensor-parallel ranks on the other.

Both are described without a process group, so that every rank, and every engine worker, plans the
same transfer by itself. Pure Python.

vLLM's layout, in the shapes its checkpoint loader fills (0.32):
    qkv_proj       rows [queries | keys | values] of this rank; with more ranks than KV heads a head
                   is repeated on neighbouring ranks
    gate_up_proj   rows [gate | up] of this rank;   o_proj, down_proj  columns
    w13, w2        [experts, ...]: every expert cut as gate_up and down, or, with expert
                   parallelism, whole experts on each rank
    embed_tokens, lm_head   rows padded to a multiple of 64, then cut evenly
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_sod.convert.layout import Segment, sharding_of
from megatron_sod.model.geometry import Geometry

VLLM_VOCAB_MULTIPLE = 64
LAYER = "model.layers.0."  # templates are written for layer 0


@dataclass(frozen=True)
class Holder:
    """Trainer ranks of one pipeline stage that hold the same part of the same tensors.

    kind "replicated": all of them; "tensor": tensor-parallel rank `tp_rank`; "expert":
    expert-parallel rank `ep_rank`, and rank `tp_rank` among those that split each expert.
    """

    kind: str
    tp_rank: int = 0
    ep_rank: int = 0


@dataclass(frozen=True)
class TrainerLayout:
    """Megatron's rank order tp-cp-ep-dp-pp, and its interleaved assignment of layers."""

    world_size: int
    num_layers: int
    tp_size: int = 1
    pp_size: int = 1
    num_chunks: int = 1  # model chunks of a pipeline rank (virtual pipeline)
    ep_size: int = 1
    expert_tp_size: int = 1

    def __post_init__(self) -> None:
        for what, size in (
            ("pipeline x tensor", self.pp_size * self.tp_size),
            (
                "pipeline x expert x expert tensor",
                self.pp_size * self.ep_size * self.expert_tp_size,
            ),
        ):
            if self.world_size % size:
                raise ValueError(
                    f"trainer layout: {what} parallel size {size} does not divide world size "
                    f"{self.world_size}"
                )
        if self.num_layers % (self.pp_size * self.num_chunks):
            raise ValueError(
                f"trainer layout: {self.pp_size} x {self.num_chunks} pipeline chunks do not divide "
                f"{self.num_layers} layers"
            )

    @property
    def ranks_per_stage(self) -> int:
        return self.world_size // self.pp_size

    def stage_of_layer(self, layer: int) -> int:
        per_chunk = self.num_layers // (self.pp_size * self.num_chunks)
        return layer // per_chunk % self.pp_size

    def layer_order(self) -> list[int]:
        """Layers so that every pipeline stage has something to send all the time."""
        of_stage: list[list[int]] = [[] for _ in range(self.pp_size)]
        for layer in range(self.num_layers):
            of_stage[self.stage_of_layer(layer)].append(layer)
        return [layer for together in zip(*of_stage, strict=True) for layer in together]

    def holders(self, name: str) -> Iterator[tuple[Holder, dict[str, int]]]:
        """(holder, arguments of convert.layout.segments_of) for a Megatron parameter."""
        sharding = sharding_of(name)
        if sharding == "expert":
            for ep_rank in range(self.ep_size):
                for tp_rank in range(self.expert_tp_size):
                    yield (
                        Holder("expert", tp_rank, ep_rank),
                        {
                            "ep_rank": ep_rank,
                            "ep_size": self.ep_size,
                            "expert_tp_rank": tp_rank,
                            "expert_tp_size": self.expert_tp_size,
                        },
                    )
        elif sharding == "replicated":
            yield Holder("replicated"), {}
        else:
            for tp_rank in range(self.tp_size):
                yield (
                    Holder("tensor", tp_rank),
                    {"tp_rank": tp_rank, "tp_size": self.tp_size},
                )

    def rank_of(self, holder: Holder, stage: int, turn: int) -> int:
        """The global rank that serves `holder`; copies of the weights take turns."""
        if holder.kind == "expert":
            width = self.expert_tp_size
            place = holder.tp_rank + width * holder.ep_rank
            width *= self.ep_size
        elif holder.kind == "tensor":
            place, width = holder.tp_rank, self.tp_size
        else:
            place, width = 0, 1
        copies = self.ranks_per_stage // width
        return stage * self.ranks_per_stage + place + width * (turn % copies)


@dataclass(frozen=True)
class EngineLayout:
    """One vLLM engine, and how many equal ones there are."""

    tp_size: int = 1
    num_engines: int = 1
    expert_parallel: bool = False
    vocab_size: int | None = None  # rows the engines hold; None: all of the student's

    @property
    def num_destinations(self) -> int:
        """Engine workers; worker `rank` of engine `i` is destination i * tp_size + rank."""
        return self.tp_size * self.num_engines


@dataclass(frozen=True)
class EngineTensor:
    """One vLLM parameter on one rank. `parts`: (index along the expert dimension, segment)."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[int | None, Segment], ...]


def megatron_layer_names(geometry: Geometry, ep_size: int) -> list[str]:
    """The parameters of one decoder layer on one rank, with layer number 0."""
    names = ["input_layernorm.weight", "self_attention.linear_qkv.weight"]
    if geometry.qkv_bias:
        names.append("self_attention.linear_qkv.bias")
    if geometry.qk_norm:
        names += [f"self_attention.{which}_layernorm.weight" for which in "qk"]
    names += ["self_attention.linear_proj.weight", "pre_mlp_layernorm.weight"]
    if geometry.is_moe:
        names.append("mlp.router.weight")
        for expert in range(geometry.num_experts // ep_size):
            prefix = f"mlp.experts.local_experts.{expert}.linear_fc"
            names += [f"{prefix}1.weight", f"{prefix}2.weight"]
    else:
        names += ["mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
    return ["decoder.layers.0." + name for name in names]


def embedding_tensors(geometry: Geometry, engine: EngineLayout, rank: int) -> list[EngineTensor]:
    return [_vocabulary("model.embed_tokens.weight", geometry, engine, rank)]


def head_tensors(geometry: Geometry, engine: EngineLayout, rank: int) -> list[EngineTensor]:
    """The final norm, and the head unless it is the embedding."""
    tensors = [_whole("model.norm.weight", (geometry.hidden_size,))]
    if not geometry.tied_embeddings:
        tensors.append(_vocabulary("lm_head.weight", geometry, engine, rank))
    return tensors


def layer_tensors(geometry: Geometry, engine: EngineLayout, rank: int) -> list[EngineTensor]:
    """Layer 0 on one rank, in the order vLLM's modules follow each other."""
    hidden, head, tp = geometry.hidden_size, geometry.head_dim, engine.tp_size
    attention = LAYER + "self_attn."
    columns = geometry.num_attention_heads * head // tp
    tensors = [_whole(LAYER + "input_layernorm.weight", (hidden,))]
    tensors += _qkv(attention, geometry, tp, rank)
    if geometry.qk_norm:
        tensors += [_whole(f"{attention}{which}_norm.weight", (head,)) for which in "qk"]
    tensors.append(_columns(attention + "o_proj.weight", hidden, columns, rank))
    tensors.append(_whole(LAYER + "post_attention_layernorm.weight", (hidden,)))
    if geometry.is_moe:
        tensors.append(_whole(LAYER + "mlp.gate.weight", (geometry.num_experts, hidden)))
        return tensors + _experts(LAYER + "mlp.experts.", geometry, engine, rank)
    ffn = geometry.ffn_hidden_size // tp
    gate_up = _gate_up(LAYER + "mlp.", ffn, rank)
    tensors.append(
        EngineTensor(
            LAYER + "mlp.gate_up_proj.weight", (2 * ffn, hidden), tuple((None, s) for s in gate_up)
        )
    )
    tensors.append(_columns(LAYER + "mlp.down_proj.weight", hidden, ffn, rank))
    return tensors


def _whole(name: str, shape: tuple[int, ...]) -> EngineTensor:
    return EngineTensor(name, shape, ((None, Segment(name, 0, 0, 0, shape[0])),))


def _columns(name: str, rows: int, columns: int, rank: int) -> EngineTensor:
    part = Segment(name, 1, rank * columns, 0, columns)
    return EngineTensor(name, (rows, columns), ((None, part),))


def _vocabulary(name: str, geometry: Geometry, engine: EngineLayout, rank: int) -> EngineTensor:
    vocab_size = engine.vocab_size or geometry.vocab_size
    padded = -(-vocab_size // VLLM_VOCAB_MULTIPLE) * VLLM_VOCAB_MULTIPLE
    rows = padded // engine.tp_size
    length = min(rows, vocab_size - rank * rows)
    part = Segment(name, 0, rank * rows, 0, length)
    shape = (rows, geometry.hidden_size)
    return EngineTensor(name, shape, ((None, part),) if length > 0 else ())


def _qkv(prefix: str, geometry: Geometry, tp: int, rank: int) -> list[EngineTensor]:
    head, groups = geometry.head_dim, geometry.num_query_groups
    queries = geometry.num_attention_heads // tp * head
    keys = max(1, groups // tp) * head
    first_key = rank * keys if groups >= tp else rank // (tp // groups) * head
    tensors = []
    for kind, width in (("weight", (geometry.hidden_size,)), ("bias", ())):
        if kind == "bias" and not geometry.qkv_bias:
            continue
        parts, row = [], 0
        for which, start, length in (
            ("q", rank * queries, queries),
            ("k", first_key, keys),
            ("v", first_key, keys),
        ):
            parts.append((None, Segment(f"{prefix}{which}_proj.{kind}", 0, start, row, length)))
            row += length
        tensors.append(EngineTensor(f"{prefix}qkv_proj.{kind}", (row, *width), tuple(parts)))
    return tensors


def _gate_up(prefix: str, ffn: int, rank: int) -> list[Segment]:
    return [
        Segment(f"{prefix}{which}_proj.weight", 0, rank * ffn, row * ffn, ffn)
        for row, which in enumerate(("gate", "up"))
    ]


def _experts(
    prefix: str, geometry: Geometry, engine: EngineLayout, rank: int
) -> list[EngineTensor]:
    num_experts, ffn, hidden = (
        geometry.num_experts,
        geometry.expert_ffn_hidden_size,
        geometry.hidden_size,
    )
    first, slice_rank = 0, rank
    if engine.expert_parallel:
        num_experts //= engine.tp_size
        first, slice_rank = rank * num_experts, 0
    else:
        ffn //= engine.tp_size
    up: list[tuple[int | None, Segment]] = []
    down: list[tuple[int | None, Segment]] = []
    for index in range(num_experts):
        name = f"{prefix}{first + index}."
        up += [(index, segment) for segment in _gate_up(name, ffn, slice_rank)]
        down.append((index, Segment(f"{name}down_proj.weight", 1, slice_rank * ffn, 0, ffn)))
    return [
        EngineTensor(prefix + "w13_weight", (num_experts, 2 * ffn, hidden), tuple(up)),
        EngineTensor(prefix + "w2_weight", (num_experts, hidden, ffn), tuple(down)),
    ]
