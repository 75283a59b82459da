"""trajectories.jsonl as columns: the pieces of text of each token, and what both models said."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_sod.observe.report.pieces import Pieces

LOGPROB_SCALE = 1000  # columns hold 1/1000 nat in 16 bits
NOT_SCORED = -32768


def text_columns(
    kept: list[dict], ids: list[str], tokenizer: Any, max_tokens: int, notes: list[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Columns of the trajectories with text, and the table of pieces they point into.

    `text_of` [N] gives the row of a trajectory's text or -1; `text_start` [X + 1] its tokens;
    `piece`, `step`, `log_ratio`, `student_logprob` [T] each token's, prompt first (step 0).
    """
    shown = _within(kept, max_tokens)
    if len(shown) < len(kept):
        notes.append(
            f"texts of {len(kept) - len(shown)} of {len(kept)} kept trajectories are left out: the "
            f"page holds {max_tokens} tokens (--max-text-tokens)"
        )
    where = {id: place for place, id in enumerate(ids)}
    text_of = np.full(len(ids), -1, np.int32)
    pieces, start = Pieces(tokenizer), [0]
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in ("piece", "step", "log_ratio", "student_logprob")
    }
    for row in shown:
        if row["trajectory"] not in where:
            continue
        text_of[where[row["trajectory"]]] = len(start) - 1
        prompt = len(row["prompt_token_ids"])
        tokens = pieces.add(row["prompt_token_ids"] + row["response_token_ids"])
        step = np.array([0] * prompt + row["step_ids"], np.uint16)
        columns["piece"].append(tokens)
        columns["step"].append(step)
        columns["log_ratio"].append(_milli(row.get("log_ratios", []), step))
        columns["student_logprob"].append(_milli(row.get("student_logprobs", []), step))
        start.append(start[-1] + len(tokens))
    kinds = {"piece": np.uint32, "step": np.uint16}
    flat = {
        name: np.concatenate(parts) if parts else np.zeros(0, kinds.get(name, np.int16))
        for name, parts in columns.items()
    }
    return {"text_of": text_of, "text_start": np.array(start, np.int32), **flat}, pieces.table


def _within(kept: list[dict], max_tokens: int) -> list[dict]:
    """Trajectories spread evenly over the run, within the budget of tokens."""
    sizes = [len(row["prompt_token_ids"]) + len(row["response_token_ids"]) for row in kept]
    if sum(sizes) <= max_tokens:
        return kept
    share, owed = max_tokens / sum(sizes), 0.0
    shown, left = [], max_tokens
    for row, size in zip(kept, sizes, strict=True):
        owed += share * size
        if size <= owed and size <= left:
            shown.append(row)
            owed -= size
            left -= size
    return shown


def _milli(values: list[float], step: np.ndarray) -> np.ndarray:
    """[tokens] int16 in 1/1000 nat on the student's tokens; NOT_SCORED elsewhere, and on all of
    them where the run scored none."""
    found = np.full(len(step), NOT_SCORED, np.int16)
    scored = np.array(values, np.float64)
    if len(scored) == int((step > 0).sum()):
        limit = -NOT_SCORED - 1
        whole = np.clip(
            np.where(np.isfinite(scored), scored, 0.0) * LOGPROB_SCALE, -limit, limit
        ).round()
        found[step > 0] = np.where(np.isfinite(scored), whole, NOT_SCORED)
    return found
