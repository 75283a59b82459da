"""Equations written out literally, token by token, as oracles for the closed forms."""

from __future__ import annotations

import math


def step_divergence_loop(student_logprobs, teacher_logprobs, step_ids) -> list[float]:
    """Eq. 6 for one trajectory of Python numbers: mean |log-ratio| of each step, NaN if empty."""
    divergences = []
    for k in range(1, max(step_ids, default=0) + 1):
        total, count = 0.0, 0
        for student, teacher, step in zip(
            student_logprobs, teacher_logprobs, step_ids, strict=True
        ):
            if step == k:
                total += abs(student - teacher)
                count += 1
        divergences.append(total / count if count else math.nan)
    return divergences


def step_weights_loop(divergences, delta: float, epsilon: float) -> list[float]:
    """Eq. 7: w_1 = 1, w_k = min(prod_{u<k} (d_u + eps) / (d_{u+1} + eps), 1 + delta)."""
    weights = []
    for k in range(len(divergences)):
        product = 1.0
        for u in range(k):
            product *= (divergences[u] + epsilon) / (divergences[u + 1] + epsilon)
        weights.append(1.0 if k == 0 else min(product, 1.0 + delta))
    return weights


def running_clip_loop(divergences, delta: float, epsilon: float) -> list[float]:
    """w_k = min(w_{k-1} * r_k, 1 + delta): the variant that carries the cap on."""
    weights = [1.0]
    for k in range(1, len(divergences)):
        ratio = (divergences[k - 1] + epsilon) / (divergences[k] + epsilon)
        weights.append(min(weights[-1] * ratio, 1.0 + delta))
    return weights
