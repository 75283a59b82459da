"""Directories of randomly initialised tiny models for the demo and the tests.

python -m megatron_sod.data.tiny_models OUT_DIR      student/ and teacher/ for the demo's cold start
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_sod.data.tiny_tokenizer import save_tiny_tokenizer

VOCAB_SIZE = 384
STUDENT = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
TEACHER = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 256}


def write_tiny_model(directory: str | Path, **overrides) -> Path:
    """config.json, generation config and tokenizer of a Qwen3-shaped model, without weights.

    head_dim is explicit and not hidden / heads, and two query heads share a KV head, as in Qwen3.
    An override of None leaves the key out.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB_SIZE,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "torch_dtype": "float32",
        "bos_token_id": None,
        **STUDENT,
        **overrides,
    }
    config = {key: v for key, v in config.items() if v is not None or key not in overrides}
    save_tiny_tokenizer(directory, VOCAB_SIZE)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    config |= {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return directory


if __name__ == "__main__":
    out = Path(sys.argv[1])
    write_tiny_model(out / "student", **STUDENT)
    write_tiny_model(out / "teacher", **TEACHER)
