"""Random models and trajectories for checks that need no trained model."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_sod.convert.layout import hf_shapes
from megatron_sod.data.tiny_models import write_tiny_model
from megatron_sod.model.geometry import load_geometry
from megatron_sod.types import Step, Trajectory


def write_model_with_weights(
    directory: Path, *, seed: int, dtype: torch.dtype = torch.float32, scale: float = 0.08, **config
) -> Path:
    """A tiny Qwen3-shaped directory whose random weights are large enough to disagree."""
    write_tiny_model(directory, **config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in hf_shapes(load_geometry(directory)).items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        # a router that decides clearly: no expert changes on a rounding error
        values = values * 10 if name.endswith("mlp.gate.weight") else values
        tensors[name] = (values + 1.0 if "norm" in name else values).to(dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def synthetic_trajectories(
    num_prompts: int, num_generations: int, *, vocab_size: int, seed: int
) -> list[Trajectory]:
    """Trajectories of one to four steps with awkward lengths: one-token steps, a step with a tool
    error, a response cut short, one lost to infrastructure."""
    rng = random.Random(seed)
    trajectories = []
    for prompt in range(num_prompts):
        prompt_ids = [rng.randrange(vocab_size) for _ in range(rng.randint(3, 9))]
        for sample in range(num_generations):
            trajectories.append(_trajectory(rng, prompt, sample, prompt_ids, vocab_size))
    trajectories[-1] = Trajectory(
        **{**trajectories[-1].__dict__, "finish_reason": "infra_error", "reward": float("nan")}
    )
    return trajectories


def _trajectory(rng, prompt: int, sample: int, prompt_ids: list[int], vocab_size: int):
    response: list[int] = []
    mask: list[bool] = []
    step_ids: list[int] = []
    steps = []
    for number in range(1, rng.randint(1, 4) + 1):
        length = rng.choice([1, 2, 5, 7])
        response += [rng.randrange(vocab_size) for _ in range(length)]
        mask += [True] * length
        step_ids += [number] * length
        steps.append(Step(number, rng.choice(["ok", "user_error", "none"]), length, 1))
        gap = rng.randint(0, 4)  # 0: two turns with no observation between them
        response += [rng.randrange(vocab_size) for _ in range(gap)]
        mask += [False] * gap
        step_ids += [0] * gap
    return Trajectory(
        trajectory_id=f"p{prompt}/{sample}",
        prompt_id=f"p{prompt}",
        prompt_token_ids=prompt_ids,
        response_token_ids=response,
        loss_mask=mask,
        step_ids=step_ids,
        rollout_logprobs=[-1.0 if m else 0.0 for m in mask],
        policy_versions=[0 if m else -1 for m in mask],
        steps=tuple(steps),
        finish_reason="answer",
        reward=float(rng.random() < 0.5),
        policy_version=0,
    )
