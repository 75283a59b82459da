"""One record per sample: what was answered, how it was graded, what the tools did."""

from __future__ import annotations

from typing import Any

from megatron_sod.rollout.answers import last_boxed, normalised
from megatron_sod.rollout.code_tests import is_code_task
from megatron_sod.rollout.rewards import choice_letter, is_choice_task
from megatron_sod.types import Prompt, Trajectory


def sample_record(
    prompt: Prompt, trajectory: Trajectory, tokenizer: Any, *, seed: int, sample: int
) -> dict:
    """A JSON row. `prediction` is a choice's letter or what the box holds, "" without an answer and
    None where answers cannot be compared (programs)."""
    last_step = max(trajectory.step_ids, default=0)
    final = [
        token
        for token, step in zip(trajectory.response_token_ids, trajectory.step_ids, strict=True)
        if step == last_step and step > 0
    ]
    text = tokenizer.decode(final, skip_special_tokens=True)
    prediction: str | None = None
    if not is_code_task(prompt):
        boxed = last_boxed(text) or ""
        letter = choice_letter(boxed) if is_choice_task(prompt) else ""
        prediction = letter or normalised(boxed)
    return {
        "prompt_id": prompt.prompt_id,
        "data_source": prompt.data_source,
        "seed": seed,
        "sample": sample,
        "is_valid": trajectory.is_valid,
        "score": trajectory.reward if trajectory.is_valid else None,
        "prediction": prediction,
        "finish_reason": trajectory.finish_reason,
        "num_turns": len(trajectory.steps),
        "num_tool_calls": sum(step.num_tool_calls for step in trajectory.steps),
        "outcomes": [step.outcome for step in trajectory.steps if step.outcome != "none"],
        "response_tokens": len(trajectory.response_token_ids),
        "student_tokens": sum(trajectory.loss_mask),
        "final_text": text,
    }
