"""The clipped surrogate, per token. R rows that carry loss."""

from __future__ import annotations

import torch

MAX_LOG_RATIO = 20.0


def clipped_surrogate(
    logprobs_R: torch.Tensor,
    old_logprobs_R: torch.Tensor,
    advantages_R: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> torch.Tensor:
    """PPO's pessimistic objective with a second bound for negative advantages.

    rho = exp(clamp(log pi - log pi_old, +-20))
    loss = max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)); if A < 0: min(loss, -dual_clip A)

    Args:
        logprobs_R: [R] float, differentiable.
        old_logprobs_R, advantages_R: [R] no gradient; a positive advantage raises the probability.
    Returns:
        [R] loss per token; not reduced, so that the one division happens over global counts.
    Source: arXiv 1707.06347; dual clip arXiv 1912.09729; asymmetric clip arXiv 2503.14476.
    """
    ratio = importance_ratio(logprobs_R, old_logprobs_R)
    plain = -advantages_R * ratio
    clipped = -advantages_R * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, clipped)
    bounded = torch.minimum(loss, -dual_clip * advantages_R)
    return torch.where(advantages_R < 0, bounded, loss)


def clipped_rows(
    logprobs_R: torch.Tensor,
    old_logprobs_R: torch.Tensor,
    advantages_R: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows of `clipped_surrogate` a clip decides, and which of them the dual clip.

    Returns:
        [R] bool, the ratio's clip is the larger loss; [R] bool, A < 0 and the loss is -dual_clip A.
    """
    ratio = importance_ratio(logprobs_R, old_logprobs_R)
    plain = -advantages_R * ratio
    clipped = -advantages_R * ratio.clamp(1 - clip_low, 1 + clip_high)
    over = torch.maximum(plain, clipped) > -dual_clip * advantages_R
    return clipped > plain, over & (advantages_R < 0)


def importance_ratio(logprobs_R: torch.Tensor, old_logprobs_R: torch.Tensor) -> torch.Tensor:
    """pi / pi_old per token, finite for any pair of logprobs."""
    return torch.exp((logprobs_R - old_logprobs_R).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
