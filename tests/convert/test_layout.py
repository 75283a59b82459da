"""The one table between Hugging Face tensors and Megatron parameters, on plain tensors.

Layer: pure; ranks are simulated by calling the layout once per rank. Loading into and saving from
real models over gloo: tests/model/test_build.py; sending shards to engines: tests/reshard.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from megatron_sod.convert.layout import Segment, hf_shapes, segments_of, sharding_of
from megatron_sod.errors import ModelError
from megatron_sod.model.geometry import Geometry

# 12 query heads of 6 over 4 groups on 20 hidden: heads x head_dim (72) is not the hidden size.
GQA = Geometry(
    family="qwen3",
    num_layers=3,
    hidden_size=20,
    ffn_hidden_size=28,
    num_attention_heads=12,
    num_query_groups=4,
    head_dim=6,
    vocab_size=301,
    tied_embeddings=True,
    qk_norm=True,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=64,
    initializer_range=0.02,
)
MOE = replace(GQA, family="qwen3_moe", num_layers=2, num_experts=8, experts_per_token=3,
              expert_ffn_hidden_size=12, tied_embeddings=False)  # fmt: skip
GEOMETRIES = {
    "gqa_tied": GQA,
    "gqa_untied": replace(GQA, tied_embeddings=False),
    "every_head_its_own_group": replace(GQA, num_query_groups=12, num_layers=1),
    "groups_shared_by_ranks": replace(GQA, num_query_groups=2, num_layers=1),
    "no_qk_norm": replace(GQA, qk_norm=False, num_layers=1),
    "qkv_bias": replace(GQA, family="qwen2", qk_norm=False, qkv_bias=True, num_layers=2),
    "vocabulary_of_one_row_past_the_padding": replace(GQA, vocab_size=513, tied_embeddings=False),
    "vocabulary_smaller_than_one_shard": replace(GQA, vocab_size=97, tied_embeddings=False),
    "experts": MOE,
}
# (geometry, tensor parallel, expert parallel, split of each expert)
CASES = [(name, tp, 1, tp) for name in GEOMETRIES for tp in (1, 2, 4)]
CASES += [("experts", 1, 2, 1), ("experts", 2, 4, 1), ("experts", 4, 2, 2)]
PROJECTIONS = {"local": "local_experts.{}.linear_fc{}.weight", "grouped": "linear_fc{1}.weight{0}"}


def _parameters(g: Geometry, tp: int, ep: int, etp: int, experts: str = "local"):
    """Name -> (shape, sharding) as Megatron has them on each rank, written out independently."""
    qkv = (g.num_attention_heads + 2 * g.num_query_groups) * g.head_dim // tp
    queries = g.num_attention_heads * g.head_dim // tp
    vocabulary = (-(-g.vocab_size // (128 * tp)) * 128 * tp // tp, g.hidden_size)
    split: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": vocabulary}
    whole: dict[str, tuple[int, ...]] = {"decoder.final_layernorm.weight": (g.hidden_size,)}
    expert: dict[str, tuple[int, ...]] = {}
    for layer in range(g.num_layers):
        prefix = f"decoder.layers.{layer}."
        whole[prefix + "input_layernorm.weight"] = (g.hidden_size,)
        split[prefix + "self_attention.linear_qkv.weight"] = (qkv, g.hidden_size)
        if g.qkv_bias:
            split[prefix + "self_attention.linear_qkv.bias"] = (qkv,)
        split[prefix + "self_attention.linear_proj.weight"] = (g.hidden_size, queries)
        if g.qk_norm:
            whole[prefix + "self_attention.q_layernorm.weight"] = (g.head_dim,)
            whole[prefix + "self_attention.k_layernorm.weight"] = (g.head_dim,)
        whole[prefix + "pre_mlp_layernorm.weight"] = (g.hidden_size,)
        if g.num_experts == 0:
            ffn = g.ffn_hidden_size // tp
            split[prefix + "mlp.linear_fc1.weight"] = (2 * ffn, g.hidden_size)
            split[prefix + "mlp.linear_fc2.weight"] = (g.hidden_size, ffn)
            continue
        whole[prefix + "mlp.router.weight"] = (g.num_experts, g.hidden_size)
        ffn = g.expert_ffn_hidden_size // etp
        for number in range(g.num_experts // ep):
            name = prefix + "mlp.experts." + PROJECTIONS[experts]
            expert[name.format(number, 1)] = (2 * ffn, g.hidden_size)
            expert[name.format(number, 2)] = (g.hidden_size, ffn)
    if not g.tied_embeddings:
        split["output_layer.weight"] = vocabulary
    kinds = {"replicated": whole, "tensor": split, "expert": expert}
    return {name: (shape, kind) for kind, held in kinds.items() for name, shape in held.items()}


def _held(g: Geometry, tp: int, ep: int = 1, etp: int | None = None, experts: str = "local"):
    """(place, parameter, shape, segments) of every owner; place 0 owns what is replicated."""
    etp = etp or tp
    tensor = [dict(tp_rank=r, tp_size=tp) for r in range(tp)]
    expert = [
        dict(tp_rank=0, tp_size=tp, ep_rank=e, ep_size=ep, expert_tp_rank=r, expert_tp_size=etp)
        for e in range(ep)
        for r in range(etp)
    ]
    places = {"replicated": tensor[:1], "tensor": tensor, "expert": expert}
    for name, (shape, kind) in _parameters(g, tp, ep, etp, experts).items():
        assert sharding_of(name) == kind, name
        for place, split in enumerate(places[kind]):
            yield place, name, shape, segments_of(name, g, **split)


def _owned(g: Geometry, *layout):
    for place, name, shape, segments in _held(g, *layout):
        for segment in segments:
            yield place, name, shape, segment


def _numbered(g: Geometry) -> dict[str, torch.Tensor]:
    """HF tensors in which every element of the model has its own number."""
    tensors, start = {}, 1
    for name, shape in hf_shapes(g).items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(start, start + count, dtype=torch.float64).reshape(shape)
        start += count
    return tensors


def _filled(g: Geometry, hf: dict[str, torch.Tensor], *layout) -> dict[tuple, torch.Tensor]:
    """(place, parameter) -> values copied through the layout; NaN where nothing was copied."""
    held = {}
    for place, name, shape, segments in _held(g, *layout):
        local = torch.full(shape, float("nan"), dtype=torch.float64)
        for s in segments:
            source = hf[s.hf_name].narrow(s.dim, s.hf_start, s.length)
            local.narrow(s.dim, s.local_start, s.length).copy_(source)
        held[place, name] = local
    return held


@pytest.mark.parametrize(("name", "tp", "ep", "etp"), CASES)
def test_every_element_of_every_tensor_has_exactly_one_owner(name, tp, ep, etp):
    g = GEOMETRIES[name]
    covered = {n: torch.zeros(shape, dtype=torch.int32) for n, shape in hf_shapes(g).items()}
    for _, _, _, s in _owned(g, tp, ep, etp):
        covered[s.hf_name].narrow(s.dim, s.hf_start, s.length).add_(1)
    assert {n for n, counts in covered.items() if not bool((counts == 1).all())} == set()


@pytest.mark.parametrize(("name", "tp", "ep", "etp"), CASES)
def test_local_parameters_are_filled_exactly_once_but_for_padding(name, tp, ep, etp):
    g = GEOMETRIES[name]
    filled: dict = {}
    for rank, parameter, shape, s in _owned(g, tp, ep, etp):
        counts = filled.setdefault((rank, parameter), torch.zeros(shape, dtype=torch.int32))
        counts.narrow(s.dim, s.local_start, s.length).add_(1)
    for (rank, parameter), counts in filled.items():
        rows = counts.size(0)
        if "word_embeddings" in parameter or "output_layer" in parameter:
            rows = max(0, min(rows, g.vocab_size - rank * rows))
        assert bool((counts[:rows] == 1).all()) and not bool(counts[rows:].any()), parameter


@pytest.mark.parametrize(("name", "tp", "ep", "etp"), CASES)
def test_hf_round_trip_is_bit_exact(name, tp, ep, etp):
    g = GEOMETRIES[name]
    hf = _numbered(g)
    filled = _filled(g, hf, tp, ep, etp)
    back = {n: torch.zeros_like(t) for n, t in hf.items()}
    for place, parameter, _, s in _owned(g, tp, ep, etp):
        source = filled[place, parameter].narrow(s.dim, s.local_start, s.length)
        back[s.hf_name].narrow(s.dim, s.hf_start, s.length).copy_(source)
    assert all(torch.equal(back[n], hf[n]) for n in hf)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_padded_vocabulary_rows_have_no_source(tp):
    g = GEOMETRIES["gqa_untied"]
    filled = _filled(g, _numbered(g), tp)
    for parameter in ("embedding.word_embeddings.weight", "output_layer.weight"):
        whole = torch.cat([filled[rank, parameter] for rank in range(tp)])
        assert whole.size(0) == {1: 384, 2: 512, 4: 512}[tp]
        assert not whole[: g.vocab_size].isnan().any() and whole[g.vocab_size :].isnan().all()


def test_ranks_beyond_the_vocabulary_hold_padding_only():
    g = GEOMETRIES["vocabulary_smaller_than_one_shard"]  # 97 rows, shards of 128
    for rank in (1, 2, 3):
        assert segments_of("output_layer.weight", g, tp_rank=rank, tp_size=4) == []


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_queries_keys_and_values_of_a_group_lie_together(tp):
    """Megatron's linear_qkv: for each KV group its queries, then its key, then its value."""
    g, hf = GQA, _numbered(GQA)
    prefix = "model.layers.1.self_attn."
    q = hf[prefix + "q_proj.weight"].reshape(4, 3 * 6, 20)
    k, v = (hf[f"{prefix}{n}_proj.weight"].reshape(4, 6, 20) for n in "kv")
    expected = torch.cat([torch.cat([q[i], k[i], v[i]]) for i in range(4)]).chunk(tp)
    filled = _filled(g, hf, tp)
    for rank in range(tp):
        found = filled[rank, "decoder.layers.1.self_attention.linear_qkv.weight"]
        assert torch.equal(found, expected[rank])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_each_rank_holds_its_part_of_gate_and_then_of_up(tp):
    hf = _numbered(GQA)
    gate, up = (hf[f"model.layers.2.mlp.{n}_proj.weight"].chunk(tp) for n in ("gate", "up"))
    down = hf["model.layers.2.mlp.down_proj.weight"].chunk(tp, dim=1)
    filled = _filled(GQA, hf, tp)
    for rank in range(tp):
        fc1 = filled[rank, "decoder.layers.2.mlp.linear_fc1.weight"]
        assert torch.equal(fc1, torch.cat([gate[rank], up[rank]]))
        assert torch.equal(filled[rank, "decoder.layers.2.mlp.linear_fc2.weight"], down[rank])


def test_a_small_split_written_out():
    tiny = replace(GQA, num_attention_heads=4, num_query_groups=2, head_dim=2, num_layers=1)
    prefix = "model.layers.0.self_attn."
    # rank 1 of 2 holds group 1: query rows 4..7, key rows 2..3, value rows 2..3
    assert segments_of("decoder.layers.0.self_attention.linear_qkv.weight", tiny,
                       tp_rank=1, tp_size=2) == [
        Segment(prefix + "q_proj.weight", 0, 4, 0, 4),
        Segment(prefix + "k_proj.weight", 0, 2, 4, 2),
        Segment(prefix + "v_proj.weight", 0, 2, 6, 2),
    ]  # fmt: skip


def test_ranks_that_share_a_group_hold_parts_of_it():
    tiny = replace(GQA, num_attention_heads=4, num_query_groups=1, head_dim=2, num_layers=1)
    prefix = "model.layers.0.self_attn."
    # rows 0..7 queries, 8..9 key, 10..11 value: rank 2 of 4 holds rows 6..8
    assert segments_of("decoder.layers.0.self_attention.linear_qkv.weight", tiny,
                       tp_rank=2, tp_size=4) == [
        Segment(prefix + "q_proj.weight", 0, 6, 0, 2),
        Segment(prefix + "k_proj.weight", 0, 0, 2, 1),
    ]  # fmt: skip


def test_a_local_expert_is_the_global_one_counted_from_the_ranks_first():
    # rank 1 of 2 holds experts 4..7; second of the two halves of an expert of width 12
    where = dict(ep_rank=1, ep_size=2, expert_tp_rank=1, expert_tp_size=2)
    prefix = "model.layers.1.mlp.experts.6."
    for experts in PROJECTIONS.values():
        name = "decoder.layers.1.mlp.experts." + experts
        assert segments_of(name.format(2, 1), MOE, **where) == [
            Segment(prefix + "gate_proj.weight", 0, 6, 0, 6),
            Segment(prefix + "up_proj.weight", 0, 6, 6, 6),
        ]
        assert segments_of(name.format(2, 2), MOE, **where) == [
            Segment(prefix + "down_proj.weight", 1, 6, 0, 6)
        ]


def test_a_bias_follows_the_rows_of_its_weight():
    name = "decoder.layers.0.self_attention.linear_qkv."
    weight, bias = (
        segments_of(name + kind, GEOMETRIES["qkv_bias"], tp_rank=1, tp_size=2)
        for kind in ("weight", "bias")
    )
    assert [replace(s, hf_name=s.hf_name.replace("bias", "weight")) for s in bias] == weight
    with pytest.raises(ModelError, match="no Hugging Face counterpart in a qwen3 model"):
        segments_of(name + "bias", GQA)


def test_a_tied_head_is_the_embedding_and_is_stored_once():
    assert segments_of("output_layer.weight", GQA) == segments_of(
        "embedding.word_embeddings.weight", GQA
    )
    assert "lm_head.weight" not in hf_shapes(GQA)
    assert "lm_head.weight" in hf_shapes(GEOMETRIES["gqa_untied"])


@pytest.mark.parametrize(
    ("fused", "local"),
    [
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    ],
)
def test_fused_norms_of_transformer_engine_mean_the_same_tensors(fused, local):
    assert segments_of(f"decoder.layers.2.{fused}", GQA) == segments_of(
        f"decoder.layers.2.{local}", GQA
    )


def test_names_are_those_of_the_real_checkpoint():
    names = Counter(
        ".".join("N" if part.isdigit() else part for part in name.split(".")[2:])
        for name in hf_shapes(GQA)
        if ".layers." in name
    )
    assert set(names.values()) == {3}
    assert {n.removeprefix("N.") for n in names} == {
        "input_layernorm.weight", "post_attention_layernorm.weight",
        "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
        "self_attn.o_proj.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight",
        "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["decoder.layers.0.mlp.router.weight", "decoder.layers.9.input_layernorm.weight", ""]
)
def test_an_unknown_parameter_is_refused_by_name(name):
    with pytest.raises(ModelError, match="no Hugging Face counterpart"):
        segments_of(name, GQA)
