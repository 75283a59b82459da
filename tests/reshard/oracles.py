"""What the planner is held against: Megatron's rank order by its own generator, vLLM's fused
parameters by torch.cat, and tiny geometries with awkward sizes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from megatron.core.parallel_state import RankGenerator

from megatron_sod.model.geometry import Geometry, geometry_from_hf
from megatron_sod.reshard.layouts import TrainerLayout, megatron_layer_names

TINY = {
    "family": "qwen3",
    "num_layers": 8,
    "hidden_size": 24,
    "ffn_hidden_size": 40,
    "num_attention_heads": 8,
    "num_query_groups": 8,
    "head_dim": 3,
    "vocab_size": 389,
    "tied_embeddings": False,
    "qk_norm": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 64,
    "initializer_range": 0.02,
}
TINY_MOE = TINY | {"num_experts": 8, "experts_per_token": 2, "expert_ffn_hidden_size": 16}


def _coordinates(trainer: TrainerLayout, rank: int) -> dict[str, int]:
    """The rank's place in each of Megatron's groups, from Megatron's own generator."""
    stage = trainer.world_size // trainer.pp_size
    dense = RankGenerator(
        tp=trainer.tp_size, ep=1, dp=stage // trainer.tp_size, pp=trainer.pp_size, cp=1,
        order="tp-cp-ep-dp-pp",
    )  # fmt: skip
    width = trainer.expert_tp_size * trainer.ep_size
    expert = RankGenerator(
        tp=trainer.expert_tp_size, ep=trainer.ep_size, dp=stage // width, pp=trainer.pp_size, cp=1,
        order="tp-cp-ep-dp-pp",
    )  # fmt: skip

    def place(generator, token):
        return next(g.index(rank) for g in generator.get_ranks(token) if rank in g)

    return {
        "tp": place(dense, "tp"),
        "pp": place(dense, "pp"),
        "ep": place(expert, "ep"),
        "etp": place(expert, "tp"),
    }


def parameters_of(rank, geometry, trainer):
    """(global Megatron name, split) of what a rank holds, written down from Megatron's rules."""
    at = _coordinates(trainer, rank)
    split = {
        "tp_rank": at["tp"],
        "tp_size": trainer.tp_size,
        "ep_rank": at["ep"],
        "ep_size": trainer.ep_size,
        "expert_tp_rank": at["etp"],
        "expert_tp_size": trainer.expert_tp_size,
    }
    if at["pp"] == 0:
        yield "embedding.word_embeddings.weight", split
    if at["pp"] == trainer.pp_size - 1:
        yield "decoder.final_layernorm.weight", split
        if not geometry.tied_embeddings:
            yield "output_layer.weight", split
    per_chunk = trainer.num_layers // trainer.pp_size // trainer.num_chunks
    for chunk in range(trainer.num_chunks):
        first = (chunk * trainer.pp_size + at["pp"]) * per_chunk
        for layer in range(first, first + per_chunk):
            for name in megatron_layer_names(geometry, trainer.ep_size):
                yield name.replace("layers.0.", f"layers.{layer}."), split


def engine_oracle(geometry, weights, tp, rank, expert_parallel) -> dict[str, torch.Tensor]:
    """vLLM's parameters on one rank, written out."""

    def rows(name, size=tp, at=rank):
        return weights[name].chunk(size)[at]

    heads, groups = geometry.num_attention_heads, geometry.num_query_groups
    per_group = heads // groups
    my_heads = range(rank * heads // tp, (rank + 1) * heads // tp)
    my_groups = sorted({head // per_group for head in my_heads})
    found = {"model.norm.weight": weights["model.norm.weight"]}
    shape = (-(-geometry.vocab_size // 64) * 64, geometry.hidden_size)
    padded = torch.zeros(shape, dtype=weights["model.norm.weight"].dtype)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            padded[: geometry.vocab_size] = weights[name]
            found[name] = padded.chunk(tp)[rank].clone()
    for layer in range(geometry.num_layers):
        p = f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            if f"{p}self_attn.q_proj.{kind}" not in weights:
                continue
            q, k, v = (weights[f"{p}self_attn.{x}_proj.{kind}"] for x in "qkv")
            found[f"{p}self_attn.qkv_proj.{kind}"] = torch.cat(
                [q.split(geometry.head_dim)[head] for head in my_heads]
                + [k.split(geometry.head_dim)[group] for group in my_groups]
                + [v.split(geometry.head_dim)[group] for group in my_groups]
            )
        found[f"{p}self_attn.o_proj.weight"] = weights[f"{p}self_attn.o_proj.weight"].chunk(tp, 1)[
            rank
        ]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{p}{norm}.weight"] = weights[f"{p}{norm}.weight"]
        if geometry.qk_norm:
            for norm in ("q_norm", "k_norm"):
                found[f"{p}self_attn.{norm}.weight"] = weights[f"{p}self_attn.{norm}.weight"]
        if not geometry.is_moe:
            gate_up = [rows(f"{p}mlp.{x}_proj.weight") for x in ("gate", "up")]
            found[f"{p}mlp.gate_up_proj.weight"] = torch.cat(gate_up)
            down = weights[f"{p}mlp.down_proj.weight"]
            found[f"{p}mlp.down_proj.weight"] = down.chunk(tp, 1)[rank]
            continue
        found[f"{p}mlp.gate.weight"] = weights[f"{p}mlp.gate.weight"]
        size, at, mine = tp, rank, range(geometry.num_experts)
        if expert_parallel:
            local = geometry.num_experts // tp
            size, at, mine = 1, 0, range(rank * local, (rank + 1) * local)
        prefix = f"{p}mlp.experts."
        found[f"{prefix}w13_weight"] = torch.stack(
            [
                torch.cat([rows(f"{prefix}{e}.{x}_proj.weight", size, at) for x in ("gate", "up")])
                for e in mine
            ]
        )
        found[f"{prefix}w2_weight"] = torch.stack(
            [weights[f"{prefix}{e}.down_proj.weight"].chunk(size, 1)[at] for e in mine]
        )
    return found


def real_geometry(name: str) -> Geometry:
    folder = os.environ.get("SOD_SHARED_DATA")
    if not folder:
        pytest.skip("SOD_SHARED_DATA is not set: it names the folder with configs_qwen3/")
    path = Path(folder) / "configs_qwen3" / f"{name}.config.json"
    return geometry_from_hf(json.loads(path.read_text()))
