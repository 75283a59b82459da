"""How far stored ids are from what the tokenizer would make of the same text."""

from __future__ import annotations

from typing import Any

from megatron_sod.types import Trajectory


def render_mismatch_fraction(
    trajectories: list[Trajectory], tokenizer: Any, *, num_checked: int = 32
) -> float:
    """Share of trajectories whose ids differ from a fresh encoding of their own text.

    Above 0 is normal: students sample spellings that no tokenizer would choose ("1", "1" for "11"),
    and printed control tokens are kept as plain text. What was sampled is what is trained on; a
    pipeline that encodes text again would train on something else in this share.

    Args:
        num_checked: trajectories looked at, spread over the list; encoding all would cost seconds.
    """
    total = len(trajectories)
    if total == 0:
        return 0.0
    count = min(num_checked, total)
    picked = [trajectories[i * total // count] for i in range(count)]
    return sum(_differs(t, tokenizer) for t in picked) / count


def _differs(trajectory: Trajectory, tokenizer: Any) -> bool:
    ids = trajectory.prompt_token_ids + trajectory.response_token_ids
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"] != ids
