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
        outcome = rng.choice(["ok", "user_error", "none"])
        steps.append(Step(number, outcome, length, int(outcome != "none")))
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


def long_trajectories(
    num_prompts: int,
    num_generations: int,
    *,
    prompt_length: int,
    mean_response_length: int,
    vocab_size: int,
    seed: int,
) -> list[Trajectory]:
    """Random tokens in the proportions of real rollouts, for timing.

    Four assistant turns, a tenth of the response from the tool, log-normal lengths (standard
    deviation of the logarithm 0.8): what `plan.*` assumes by default. Lengths in tokens.
    """
    rng = random.Random(seed)
    trajectories = []
    for prompt in range(num_prompts):
        prompt_ids = [rng.randrange(vocab_size) for _ in range(prompt_length)]
        for sample in range(num_generations):
            length = mean_response_length * rng.lognormvariate(-0.32, 0.8)
            turns = [max(1, round(0.225 * length))] * 4
            gaps = [round(0.1 / 3 * length)] * 3 + [0]
            step_ids = [
                step
                for number, (turn, gap) in enumerate(zip(turns, gaps, strict=True), start=1)
                for step in [number] * turn + [0] * gap
            ]
            trajectories.append(
                Trajectory(
                    trajectory_id=f"p{prompt}/{sample}",
                    prompt_id=f"p{prompt}",
                    prompt_token_ids=prompt_ids,
                    response_token_ids=[rng.randrange(vocab_size) for _ in step_ids],
                    loss_mask=[step > 0 for step in step_ids],
                    step_ids=step_ids,
                    rollout_logprobs=[-1.0 if step else 0.0 for step in step_ids],
                    policy_versions=[0 if step else -1 for step in step_ids],
                    steps=tuple(
                        Step(n, "ok" if n < 4 else "none", turn, int(n < 4))
                        for n, turn in enumerate(turns, start=1)
                    ),
                    finish_reason="answer",
                    reward=float(sample % 2),
                    policy_version=0,
                )
            )
    return trajectories
