"""The numbers of a Hugging Face model that decide shapes and names, for every supported family."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_sod.errors import ModelError

SUPPORTED = {"Qwen3ForCausalLM": "qwen3"}
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Geometry:
    """Shapes of one decoder-only transformer; sizes in elements, as in config.json."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    qk_norm: bool
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    initializer_range: float
    qkv_bias: bool = False

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups

    def padded_vocab_size(self, tensor_model_parallel_size: int, divisible_by: int = 128) -> int:
        """Rows of the embedding once Megatron has padded it, a multiple of 128 x TP."""
        multiple = divisible_by * tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple


def read_hf_config(model_dir: str | Path) -> dict:
    """config.json of a model directory.

    Raises:
        ModelError: the directory or the file is missing, or is not JSON.
    """
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise ModelError(
            f"model directory {model_dir}: no config.json there; give the path of a directory "
            "saved in Hugging Face format (config.json, *.safetensors, tokenizer files)"
        )
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: not valid JSON ({error}); restore the file") from error


def geometry_from_hf(config: dict, *, source: str = "config.json") -> Geometry:
    """Read the geometry out of a parsed config.json.

    Raises:
        ModelError: an architecture this package has no mapping for, a missing size, or an option
            with which the model would compute something else.
    """
    architecture = (config.get("architectures") or ["?"])[0]
    if architecture not in SUPPORTED:
        raise ModelError(
            f"{source}: architecture {architecture!r} is not supported; supported are "
            f"{sorted(SUPPORTED)}; a new one is added in megatron_sod/model/geometry.py and "
            "megatron_sod/convert/layout.py"
        )
    if missing := [key for key in _SIZES if config.get(key) is None]:
        raise ModelError(f"{source}: no value for {', '.join(missing)}; restore the file")
    if problem := _unsupported_option(config):
        raise ModelError(f"{source}: {problem} is not supported; use a model without it")
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    head_dim = config.get("head_dim", 128)  # Qwen3's default is not hidden_size / heads
    return Geometry(
        family=SUPPORTED[architecture],
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        head_dim=head_dim or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_norm=True,
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        max_position_embeddings=config["max_position_embeddings"],
        initializer_range=config.get("initializer_range", 0.02),
        qkv_bias=bool(config.get("attention_bias", False)),
    )


def _unsupported_option(config: dict) -> str | None:
    """An option that changes what the model computes and that build.py does not carry over."""
    for key in ("rope_scaling", "rope_parameters"):
        options = config.get(key) or {}
        kind = options.get("rope_type", options.get("type", "default"))
        if kind != "default":
            return f"{key} of type {kind!r}"
    if config.get("use_sliding_window"):
        return "sliding window attention (use_sliding_window)"
    activation = config.get("hidden_act", "silu")
    return None if activation == "silu" else f"hidden_act {activation!r}"


def load_geometry(model_dir: str | Path) -> Geometry:
    """Geometry of a model directory in Hugging Face format."""
    return geometry_from_hf(read_hf_config(model_dir), source=f"{model_dir}/config.json")


def layout_problems(geometry: Geometry, parallel, role: str) -> list[str]:
    """Why `geometry` cannot be split as `parallel` asks; one line each."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    divided = [
        ("num_attention_heads", geometry.num_attention_heads, tp, "tensor_model_parallel_size"),
        ("num_key_value_heads", geometry.num_query_groups, tp, "tensor_model_parallel_size"),
        ("intermediate_size", geometry.ffn_hidden_size, tp, "tensor_model_parallel_size"),
        ("num_hidden_layers", geometry.num_layers, pp, "pipeline_model_parallel_size"),
    ]
    return [
        f"{role}.parallel.{key} {size} does not divide the model's {name} {count}; choose a divisor"
        for name, count, size, key in divided
        if count % size
    ]
