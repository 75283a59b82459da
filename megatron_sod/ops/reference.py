"""The oracle: the same statistics from `log_softmax`, in float64, over the unsharded vocabulary.

Shares no code with the op. Differentiable through autograd, so it also checks gradients.
T tokens, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from megatron_sod.ops.stats import DivergenceStats


def reference_divergence(
    student_logits_TV: torch.Tensor,
    teacher_logits_TV: torch.Tensor | None,
    target_ids_T: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    jsd_beta: float | None = None,
) -> DivergenceStats:
    """Every field of DivergenceStats in float64, whatever the logits' dtype.

    Args:
        student_logits_TV, teacher_logits_TV: [T, >= V]; columns past vocab_size are dropped.
        target_ids_T: [T]; negative rows give exactly 0.
    """
    live_T = target_ids_T >= 0
    index_T1 = target_ids_T.clamp_min(0).long()[:, None]
    log_p = _log_softmax(student_logits_TV, vocab_size, temperature)
    fields = {
        "student_logprobs": log_p.gather(1, index_T1)[:, 0],
        "student_entropy": -_expectation(log_p, log_p),
    }
    if teacher_logits_TV is not None:
        log_q = _log_softmax(teacher_logits_TV, vocab_size, temperature)
        fields |= {
            "teacher_logprobs": log_q.gather(1, index_T1)[:, 0],
            "teacher_entropy": -_expectation(log_q, log_q),
            "reverse_kl": _expectation(log_p, log_p - log_q),
            "forward_kl": _expectation(log_q, log_q - log_p),
        }
        if jsd_beta is not None:
            log_m = torch.logaddexp(log_q + math.log(jsd_beta), log_p + math.log1p(-jsd_beta))
            fields["jsd"] = jsd_beta * _expectation(log_q, log_q - log_m) + (
                1 - jsd_beta
            ) * _expectation(log_p, log_p - log_m)
    return DivergenceStats(**{k: torch.where(live_T, v, 0.0) for k, v in fields.items()})


def _log_softmax(logits: torch.Tensor, vocab_size: int, temperature: float) -> torch.Tensor:
    return F.log_softmax(logits[:, :vocab_size].double() / temperature, dim=1)


def _expectation(log_weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Sum of exp(log_weight) * value, with 0 * anything = 0 where the weight is exactly 0."""
    weight = log_weight.exp()
    return torch.where(weight > 0, weight * value, 0.0).sum(dim=1)
