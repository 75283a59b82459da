"""Shapes read out of config.json, and what cannot be used.

Layer: pure. That a model of this geometry computes the same numbers: tests/model/test_build.py.
"""

import json

import pytest

from megatron_sod.config.schema import ParallelConfig
from megatron_sod.errors import ModelError
from megatron_sod.model.geometry import (
    RopeScaling,
    geometry_from_hf,
    layout_problems,
    load_geometry,
    read_hf_config,
)

# Qwen3-0.6B: 16 heads of 128 on a hidden size of 1024.
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

# Qwen3-30B-A3B's experts
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


def _without(*keys):
    return {key: value for key, value in QWEN3.items() if key not in keys}


def test_a_real_configuration_is_read():
    g = geometry_from_hf(QWEN3)
    assert (g.family, g.num_layers, g.hidden_size, g.ffn_hidden_size) == ("qwen3", 28, 1024, 3072)
    assert (g.num_attention_heads, g.num_query_groups, g.head_dim) == (16, 8, 128)
    assert g.heads_per_group == 2 and g.tied_embeddings and g.qk_norm and not g.qkv_bias
    assert (g.rope_theta, g.rms_norm_eps, g.vocab_size) == (1e6, 1e-6, 151936)


def test_experts_are_read():
    g = geometry_from_hf({**QWEN3, **MOE})
    assert (g.family, g.num_experts, g.experts_per_token) == ("qwen3_moe", 128, 8)
    assert g.expert_ffn_hidden_size == 768 and g.norm_topk_prob and g.qk_norm and g.is_moe
    renamed = {**QWEN3, **MOE, "num_local_experts": 128}
    del renamed["num_experts"], renamed["norm_topk_prob"]
    g = geometry_from_hf(renamed)  # transformers' default is not to normalise
    assert g.num_experts == 128 and not g.norm_topk_prob
    with pytest.raises(ModelError, match="num_experts"):
        geometry_from_hf({**QWEN3, "architectures": MOE["architectures"]})


@pytest.mark.parametrize("name", ["Qwen2", "Llama"])
def test_families_without_head_dim_divide_the_hidden_size(name):
    config = {**_without("head_dim"), "architectures": [f"{name}ForCausalLM"]}
    g = geometry_from_hf(config)
    assert g.head_dim == 1024 // 16 and not g.qk_norm and g.qkv_bias == (name == "Qwen2")


def test_the_stretched_wavelengths_of_llama_are_read():
    scaling = {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    llama = {**QWEN3, "architectures": ["LlamaForCausalLM"], "rope_scaling": scaling}
    assert geometry_from_hf(llama).rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)


def test_the_newer_spelling_of_rope_is_read():
    newer = _without("rope_theta", "rope_scaling")
    newer["rope_parameters"] = {"rope_theta": 5e6, "rope_type": "default"}
    assert geometry_from_hf(newer).rope_theta == 5e6


def test_missing_optional_keys_mean_what_transformers_means():
    g = geometry_from_hf(_without("head_dim", "tie_word_embeddings", "rms_norm_eps", "rope_theta"))
    from transformers import Qwen3Config

    reference = Qwen3Config()
    assert g.head_dim == reference.head_dim == 128  # not hidden_size / heads, which is 64 here
    assert g.tied_embeddings == reference.tie_word_embeddings
    assert g.rms_norm_eps == reference.rms_norm_eps and g.rope_theta == 1e4


@pytest.mark.parametrize("architecture", [["GPT2LMHeadModel"], [], None])
def test_an_unknown_architecture_is_refused_with_the_supported_ones(architecture):
    with pytest.raises(ModelError, match="supported are .*Qwen3ForCausalLM.*convert/layout.py"):
        geometry_from_hf({**QWEN3, "architectures": architecture})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "sliding window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({**MOE, "decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({**MOE, "mlp_only_layers": [0]}, "mlp_only_layers"),
    ],
)
def test_what_would_compute_other_numbers_is_refused(change, message):
    with pytest.raises(ModelError, match=message):
        geometry_from_hf({**QWEN3, **change})


@pytest.mark.parametrize("key", ["num_attention_heads", "vocab_size", "intermediate_size"])
def test_a_missing_size_is_named_with_the_file(key):
    with pytest.raises(ModelError, match=f"model/config.json: .*{key}"):
        geometry_from_hf(_without(key), source="model/config.json")


@pytest.mark.parametrize(
    ("vocab_size", "tp", "padded"),
    [(151936, 1, 151936), (151936, 2, 152064), (384, 1, 384), (384, 2, 512), (1, 4, 512)],
)
def test_the_vocabulary_is_padded_to_a_multiple_of_128_per_rank(vocab_size, tp, padded):
    # 151936 = 1187 x 128; with two ranks 594 x 256 = 152064
    g = geometry_from_hf({**QWEN3, "vocab_size": vocab_size})
    assert g.padded_vocab_size(tp) == padded


def test_directories_that_hold_no_model_are_named(tmp_path):
    with pytest.raises(ModelError, match="no config.json there"):
        load_geometry(tmp_path / "gone")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    assert load_geometry(tmp_path) == geometry_from_hf(QWEN3)


@pytest.mark.parametrize(
    ("tp", "pp", "named"),
    [
        (1, 1, []),
        (8, 4, []),
        (16, 1, []),  # two ranks share a key and value head
        (32, 1, ["num_attention_heads 16"]),
        (3, 3, ["num_attention_heads 16", "num_hidden_layers 28", "num_key_value_heads 8"]),
        (5, 1, ["num_attention_heads 16", "intermediate_size 3072", "num_key_value_heads 8"]),
    ],
)
def test_splits_that_do_not_divide_are_listed(tp, pp, named):
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    problems = layout_problems(geometry_from_hf(QWEN3), parallel, "teacher")
    assert len(problems) == len(named)
    for problem, name in zip(problems, named, strict=True):
        assert name in problem and problem.startswith("teacher.parallel.")


def test_files_may_be_cut_in_ways_that_no_model_is_computed_in():
    parallel = ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2)
    geometry = geometry_from_hf({**QWEN3, **MOE})
    (problem,) = layout_problems(geometry, parallel, "teacher")
    assert problem.startswith("teacher.parallel.sequence_parallel must be true")
    assert layout_problems(geometry, parallel) == []


def test_experts_that_do_not_divide_and_layers_over_chunks_are_listed():
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=4,
        expert_model_parallel_size=3,
        expert_tensor_parallel_size=5,
    )
    problems = layout_problems(geometry_from_hf({**QWEN3, **MOE}), parallel, "student")
    assert [p.split("the model's ")[1].split(";")[0] for p in problems] == [
        "num_hidden_layers 28",
        "num_experts 128",
        "moe_intermediate_size 768",
    ]
    (problem,) = layout_problems(
        geometry_from_hf(QWEN3), ParallelConfig(expert_model_parallel_size=2), "student"
    )
    assert "has no experts" in problem
