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


def heuristic_loop(wrong) -> list[float]:
    """1 up to the first wrong step, then 0.9 once more for each step after it."""
    weights, factor, is_after = [], 1.0, False
    for is_wrong in wrong:
        if is_after:
            factor *= 0.9
        weights.append(factor)
        is_after = is_after or is_wrong
    return weights


def mask_after_wrong_loop(wrong) -> list[float]:
    """1 up to and including the first wrong step, 0 after it."""
    weights, is_after = [], False
    for is_wrong in wrong:
        weights.append(0.0 if is_after else 1.0)
        is_after = is_after or is_wrong
    return weights


def advantages_loop(student, teacher, step_ids, weights, group_advantage, clip) -> list[float]:
    """A_t = A_i + w_k * clip(log pi_T - log pi, +-clip), one number per counted token."""
    advantages = []
    for s, t, step in zip(student, teacher, step_ids, strict=True):
        ratio = t - s if clip is None else max(-clip, min(clip, t - s))
        advantages.append(group_advantage + weights[step - 1] * ratio)
    return advantages


def ppo_loss_loop(logprobs, old, advantages, low, high, dual) -> list[float]:
    """max(-A rho, -A clip(rho)); for A < 0 at most -dual A."""
    losses = []
    for new, before, a in zip(logprobs, old, advantages, strict=True):
        rho = math.exp(max(-20.0, min(20.0, new - before)))
        loss = max(-a * rho, -a * max(1 - low, min(1 + high, rho)))
        losses.append(min(loss, -dual * a) if a < 0 else loss)
    return losses
