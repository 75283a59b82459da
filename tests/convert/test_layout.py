"""The one table between Hugging Face tensors and Megatron parameters, on plain tensors.

Layer: pure; ranks are simulated by calling the layout once per rank. Loading into and saving from
real models over gloo: tests/model/test_build.py; sending shards to engines: tests/reshard.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from megatron_sod.convert.layout import Segment, hf_shapes, segments_of
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
GEOMETRIES = {
    "gqa_tied": GQA,
    "gqa_untied": replace(GQA, tied_embeddings=False),
    "every_head_its_own_group": replace(GQA, num_query_groups=12, num_layers=1),
    "no_qk_norm": replace(GQA, qk_norm=False, num_layers=1),
    "vocabulary_of_one_row_past_the_padding": replace(GQA, vocab_size=513, tied_embeddings=False),
    "vocabulary_smaller_than_one_shard": replace(GQA, vocab_size=97, tied_embeddings=False),
}
CASES = [(name, tp) for name in GEOMETRIES for tp in (1, 2, 4)]


def _parameters(g: Geometry, tp: int) -> dict[str, tuple[int, ...]]:
    """Shapes Megatron gives its parameters on each rank, written out independently."""
    qkv = (g.num_attention_heads + 2 * g.num_query_groups) * g.head_dim // tp
    queries = g.num_attention_heads * g.head_dim // tp
    vocabulary = (-(-g.vocab_size // (128 * tp)) * 128 * tp // tp, g.hidden_size)
    shapes = {"embedding.word_embeddings.weight": vocabulary}
    for layer in range(g.num_layers):
        prefix = f"decoder.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (g.hidden_size,)
        shapes[prefix + "self_attention.linear_qkv.weight"] = (qkv, g.hidden_size)
        shapes[prefix + "self_attention.linear_proj.weight"] = (g.hidden_size, queries)
        if g.qk_norm:
            shapes[prefix + "self_attention.q_layernorm.weight"] = (g.head_dim,)
            shapes[prefix + "self_attention.k_layernorm.weight"] = (g.head_dim,)
        shapes[prefix + "pre_mlp_layernorm.weight"] = (g.hidden_size,)
        ffn = g.ffn_hidden_size // tp
        shapes[prefix + "mlp.linear_fc1.weight"] = (2 * ffn, g.hidden_size)
        shapes[prefix + "mlp.linear_fc2.weight"] = (g.hidden_size, ffn)
    shapes["decoder.final_layernorm.weight"] = (g.hidden_size,)
    if not g.tied_embeddings:
        shapes["output_layer.weight"] = vocabulary
    return shapes


def _owned(g: Geometry, tp: int):
    """(rank, parameter, shape, segment) of every owner; rank 0 owns what is replicated."""
    for rank in range(tp):
        for name, shape in _parameters(g, tp).items():
            if len(shape) == 1 and rank:
                continue
            for segment in segments_of(name, g, tp_rank=rank, tp_size=tp):
                yield rank, name, shape, segment


def _numbered(g: Geometry) -> dict[str, torch.Tensor]:
    """HF tensors in which every element of the model has its own number."""
    tensors, start = {}, 1
    for name, shape in hf_shapes(g).items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(start, start + count, dtype=torch.float64).reshape(shape)
        start += count
    return tensors


def _shards(g: Geometry, tp: int, hf: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Each rank's parameters, filled through the layout; NaN where nothing has been copied."""
    ranks = []
    for rank in range(tp):
        held = {}
        for name, shape in _parameters(g, tp).items():
            local = torch.full(shape, float("nan"), dtype=torch.float64)
            for s in segments_of(name, g, tp_rank=rank, tp_size=tp):
                source = hf[s.hf_name].narrow(s.dim, s.hf_start, s.length)
                local.narrow(s.dim, s.local_start, s.length).copy_(source)
            held[name] = local
        ranks.append(held)
    return ranks


@pytest.mark.parametrize(("name", "tp"), CASES)
def test_every_element_of_every_tensor_has_exactly_one_owner(name, tp):
    g = GEOMETRIES[name]
    covered = {n: torch.zeros(shape, dtype=torch.int32) for n, shape in hf_shapes(g).items()}
    for _, _, _, s in _owned(g, tp):
        covered[s.hf_name].narrow(s.dim, s.hf_start, s.length).add_(1)
    assert {n for n, counts in covered.items() if not bool((counts == 1).all())} == set()


@pytest.mark.parametrize(("name", "tp"), CASES)
def test_local_parameters_are_filled_exactly_once_but_for_padding(name, tp):
    g = GEOMETRIES[name]
    filled: dict = {}
    for rank, parameter, shape, s in _owned(g, tp):
        counts = filled.setdefault((rank, parameter), torch.zeros(shape, dtype=torch.int32))
        counts.narrow(s.dim, s.local_start, s.length).add_(1)
    for (rank, parameter), counts in filled.items():
        rows = counts.size(0)
        if "word_embeddings" in parameter or "output_layer" in parameter:
            rows = max(0, min(rows, g.vocab_size - rank * rows))
        assert bool((counts[:rows] == 1).all()) and not bool(counts[rows:].any()), parameter


@pytest.mark.parametrize(("name", "tp"), CASES)
def test_hf_round_trip_is_bit_exact(name, tp):
    g = GEOMETRIES[name]
    hf = _numbered(g)
    ranks = _shards(g, tp, hf)
    back = {n: torch.zeros_like(t) for n, t in hf.items()}
    for rank, parameter, _, s in _owned(g, tp):
        source = ranks[rank][parameter].narrow(s.dim, s.local_start, s.length)
        back[s.hf_name].narrow(s.dim, s.hf_start, s.length).copy_(source)
    assert all(torch.equal(back[n], hf[n]) for n in hf)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_padded_vocabulary_rows_have_no_source(tp):
    g = GEOMETRIES["gqa_untied"]
    ranks = _shards(g, tp, _numbered(g))
    for parameter in ("embedding.word_embeddings.weight", "output_layer.weight"):
        whole = torch.cat([held[parameter] for held in ranks])
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
    for rank, held in enumerate(_shards(g, tp, hf)):
        assert torch.equal(held["decoder.layers.1.self_attention.linear_qkv.weight"],
                           expected[rank])  # fmt: skip


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_each_rank_holds_its_part_of_gate_and_then_of_up(tp):
    hf = _numbered(GQA)
    gate, up = (hf[f"model.layers.2.mlp.{n}_proj.weight"].chunk(tp) for n in ("gate", "up"))
    down = hf["model.layers.2.mlp.down_proj.weight"].chunk(tp, dim=1)
    for rank, held in enumerate(_shards(GQA, tp, hf)):
        fc1 = held["decoder.layers.2.mlp.linear_fc1.weight"]
        assert torch.equal(fc1, torch.cat([gate[rank], up[rank]]))
        assert torch.equal(held["decoder.layers.2.mlp.linear_fc2.weight"], down[rank])


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


@pytest.mark.parametrize("name", ["decoder.layers.0.mlp.router.weight", "vision.weight", ""])
def test_an_unknown_parameter_is_refused_by_name(name):
    with pytest.raises(ModelError, match="no Hugging Face counterpart"):
        segments_of(name, GQA)
