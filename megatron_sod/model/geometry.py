"""The numbers of a Hugging Face model that decide shapes and names, for every supported family."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_sod.errors import ModelError


@dataclass(frozen=True)
class Family:
    """What an architecture means where its config.json is silent."""

    name: str
    qk_norm: bool = False
    qkv_bias: bool = False
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads
    is_moe: bool = False


SUPPORTED = {
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, default_head_dim=128),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", qk_norm=True, is_moe=True),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True),
    "LlamaForCausalLM": Family("llama"),
}
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
_MOE_SIZES = ("num_experts_per_tok", "moe_intermediate_size")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretch of the rotary wavelengths, as in config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


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
    num_experts: int = 0  # of every layer; 0: dense
    experts_per_token: int = 0
    expert_ffn_hidden_size: int = 0
    norm_topk_prob: bool = True  # the chosen experts' probabilities are divided by their sum
    rope_scaling: RopeScaling | None = None

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

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
    family = SUPPORTED[architecture]
    num_experts = config.get("num_experts") or config.get("num_local_experts") or 0
    required = _SIZES + (_MOE_SIZES if family.is_moe else ())
    missing = [key for key in required if config.get(key) is None]
    if family.is_moe and not num_experts:
        missing.append("num_experts")
    if missing:
        raise ModelError(f"{source}: no value for {', '.join(missing)}; restore the file")
    if problem := _unsupported_option(config):
        raise ModelError(f"{source}: {problem} is not supported; use a model without it")
    heads, rope = config["num_attention_heads"], _rope_options(config)
    head_dim = config.get("head_dim", family.default_head_dim)
    return Geometry(
        family=family.name,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        head_dim=head_dim or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_norm=family.qk_norm,
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        max_position_embeddings=config["max_position_embeddings"],
        initializer_range=config.get("initializer_range", 0.02),
        qkv_bias=family.qkv_bias,
        num_experts=num_experts if family.is_moe else 0,
        experts_per_token=config["num_experts_per_tok"] if family.is_moe else 0,
        expert_ffn_hidden_size=config["moe_intermediate_size"] if family.is_moe else 0,
        norm_topk_prob=bool(config.get("norm_topk_prob", False)) if family.is_moe else True,
        rope_scaling=_rope_scaling(rope, source),
    )


def _rope_options(config: dict) -> dict:
    """Rotary options, under the newer or the older key."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope_scaling(rope: dict, source: str) -> RopeScaling | None:
    if _rope_type(rope) != "llama3":
        return None
    names = [field.name for field in fields(RopeScaling)]
    if missing := [name for name in names if rope.get(name) is None]:
        raise ModelError(f"{source}: rope scaling of type llama3 without {', '.join(missing)}")
    return RopeScaling(**{name: rope[name] for name in names})


def _rope_type(rope: dict) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def _unsupported_option(config: dict) -> str | None:
    """An option that changes what the model computes and that build.py does not carry over."""
    for key in ("rope_scaling", "rope_parameters"):
        options = config.get(key) or {}
        if (kind := _rope_type(options)) not in ("default", "llama3"):
            return f"{key} of type {kind!r}"
        if options.get("partial_rotary_factor", 1.0) != 1.0:
            return f"{key}.partial_rotary_factor other than 1"
    for key, meaning in (
        ("use_sliding_window", "sliding window attention"),
        ("attention_bias", "a bias on the attention's output projection"),
        ("mlp_bias", "a bias in the feed-forward layers"),
        ("mlp_only_layers", "dense layers between the layers of experts"),
    ):
        if config.get(key):
            return f"{meaning} ({key})"
    if config.get("decoder_sparse_step", 1) != 1:
        return "dense layers between the layers of experts (decoder_sparse_step other than 1)"
    activation = config.get("hidden_act", "silu")
    return None if activation == "silu" else f"hidden_act {activation!r}"


def load_geometry(model_dir: str | Path) -> Geometry:
    """Geometry of a model directory in Hugging Face format."""
    return geometry_from_hf(read_hf_config(model_dir), source=f"{model_dir}/config.json")


def layout_problems(geometry: Geometry, parallel, role: str = "") -> list[str]:
    """Why `geometry` cannot be split as `parallel` asks; one line each.

    Args:
        role: "student" or "teacher" of a run; empty: only files are cut so, nothing is computed.
    """
    section = f"{role}.parallel." if role else ""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    chunks = pp * (parallel.virtual_pipeline_model_parallel_size or 1)
    stages = "pipeline_model_parallel_size"
    if chunks != pp:
        stages += " x virtual_pipeline_model_parallel_size"
    divided = [
        ("num_attention_heads", geometry.num_attention_heads, tp, "tensor_model_parallel_size"),
        ("num_hidden_layers", geometry.num_layers, chunks, stages),
    ]
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tp_size
    if geometry.is_moe:
        ffn = geometry.expert_ffn_hidden_size
        divided += [
            ("num_experts", geometry.num_experts, ep, "expert_model_parallel_size"),
            ("moe_intermediate_size", ffn, etp, "expert_tensor_parallel_size"),
        ]
    else:
        ffn = geometry.ffn_hidden_size
        divided.append(("intermediate_size", ffn, tp, "tensor_model_parallel_size"))
    problems = [
        f"{section}{key} {size} does not divide the model's {name} {count}; choose a divisor"
        for name, count, size, key in divided
        if count % size
    ]
    groups = geometry.num_query_groups
    rows = (geometry.num_attention_heads + 2 * groups) * geometry.head_dim
    if (groups % tp and tp % groups) or rows % tp:
        problems.append(
            f"{section}tensor_model_parallel_size {tp} can neither divide nor evenly share the "
            f"model's num_key_value_heads {groups}; choose a divisor"
        )
    needs_sp = geometry.is_moe and tp > 1 and (role == "student" or (role and ep > 1))
    if needs_sp and not parallel.sequence_parallel:
        problems.append(
            f"{section}sequence_parallel must be true: with experts and "
            f"tensor_model_parallel_size {tp}, every rank would send every token to the experts"
        )
    if ep > 1 and not geometry.is_moe:
        problems.append(
            f"{section}expert_model_parallel_size {ep}: {geometry.family} has no experts; "
            "set it to 1"
        )
    return problems
