"""A tiny configuration of every supported architecture, with the ratios of the real ones."""

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
# Heads and groups that four tensor-parallel ranks can share; overrides for write_tiny_model.
_COMMON = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
FAMILIES = {
    "qwen3": _COMMON,
    "qwen3_untied": {**_COMMON, "tie_word_embeddings": False},
    "qwen3_moe": {
        **_COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "tie_word_embeddings": False,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "qwen2": {
        **_COMMON,
        "num_key_value_heads": 2,  # four tensor-parallel ranks share them in pairs
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "head_dim": None,
    },
    "llama": {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": 16,
        "tie_word_embeddings": False,
        "rope_scaling": LLAMA3_ROPE,
    },
}
