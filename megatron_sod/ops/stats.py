"""The ten partial sums per row and rank, and what they add up to over the vocabulary.

R ranks, T tokens. Columns of `partials` (log2 units; m, u are the shard's largest scaled logits,
zs = z * log2(e) / temperature - m for the student, ys likewise - u for the teacher):
    0 m   1 Z = sum 2^zs   2 A = sum 2^zs zs   3 R = sum 2^zs (zs - ys)
    4 u   5 Y = sum 2^ys   6 C = sum 2^ys ys   7 F = sum 2^ys (zs - ys)
    8 zs of the target     9 ys of the target     NOT_MINE where another rank owns the target
Columns of `rows`: nats for 0..5, log2 units for 6..9:
    0 student logprob  1 teacher logprob  2 reverse KL  3 forward KL  4 student entropy
    5 teacher entropy  6 m  7 log2 Z  8 u  9 log2 Y          (over all ranks)
The derivation is in kernels/README.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

NUM_PARTIALS = 10
NUM_ROW_STATS = 10
NUM_SECOND = 4  # sum p (lp - lM), sum q (lq - lM), exact reverse KL, exact forward KL
NUM_COEFFICIENTS = 6  # c_logprob, c_reverse, c_forward, c_entropy, c_jsd, sum p (lp - lM)

SENTINEL = -1.0e30  # stands for -inf: finite, so that 0 * SENTINEL is 0 and differences exist
NOT_MINE = 2.0e30
INFINITE_ABOVE = 1.0e20  # a statistic this large came from a SENTINEL
LN2 = math.log(2.0)
LOG2E = 1.0 / LN2


@dataclass(frozen=True)
class DivergenceStats:
    """Per-token statistics of student p against teacher q at one temperature; nats.

    Every field is [T], float32 (float64 for float64 logits), the same bits on every rank of the
    group, exactly 0 on ignored rows; None where there is no teacher or it was not asked for.

    student_logprobs: log p(target), e.g. [-0.51, -1.20].
    teacher_logprobs: log q(target).
    reverse_kl: KL(student || teacher) = sum p log(p / q), >= 0.
    forward_kl: KL(teacher || student) = sum q log(q / p), >= 0.
    student_entropy, teacher_entropy: -sum p log p, -sum q log q.
    jsd: beta KL(q || M) + (1 - beta) KL(p || M) with M = beta q + (1 - beta) p.
    """

    student_logprobs: torch.Tensor
    teacher_logprobs: torch.Tensor | None = None
    reverse_kl: torch.Tensor | None = None
    forward_kl: torch.Tensor | None = None
    student_entropy: torch.Tensor | None = None
    teacher_entropy: torch.Tensor | None = None
    jsd: torch.Tensor | None = None

    def detached(self) -> DivergenceStats:
        """The same numbers without their gradients."""
        fields: dict[str, Any] = {k: v if v is None else v.detach() for k, v in vars(self).items()}
        return DivergenceStats(**fields)


def merge_partials(partials_RTN: torch.Tensor) -> torch.Tensor:
    """[R, T, 10] -> [T, 10] in rank order, float64: every rank that runs it gets the same bits."""
    partials = partials_RTN.double()
    m, u = partials[:, :, 0].amax(dim=0), partials[:, :, 4].amax(dim=0)
    merged = _rescaled(partials[0], m, u)
    for partial in partials[1:]:
        merged = merged + _rescaled(partial, m, u)
    merged[:, 0], merged[:, 4] = m, u
    return merged


def _rescaled(partial: torch.Tensor, m: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    m0, Z, A, R, u0, Y, C, F, label, teacher_label = partial.unbind(1)
    dm, du = m0 - m, u0 - u
    a, b = torch.exp2(dm), torch.exp2(du)
    mine = ~(label > NOT_MINE / 2)  # also true for NaN, which must come through
    return torch.stack(
        [
            torch.zeros_like(m0),
            a * Z,
            a * (A + dm * Z),
            a * (R + (dm - du) * Z),
            torch.zeros_like(u0),
            b * Y,
            b * (C + du * Y),
            b * (F + (dm - du) * Y),
            torch.where(mine, label + dm, 0.0),
            torch.where(mine, teacher_label + du, 0.0),
        ],
        dim=1,
    )


def finish_rows(partials_RTN: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """[R, T, 10] partial sums of all ranks -> [T, 10] row statistics in the partials' dtype.

    A target that no rank owns gives a NaN logprob; rows with a negative target are exactly 0.
    """
    merged = merge_partials(partials_RTN)
    m, Z, A, R, u, Y, C, F, label, teacher_label = merged.unbind(1)
    owned = (~(partials_RTN[:, :, 8] > NOT_MINE / 2)).any(dim=0)
    log_z, log_y = torch.log2(Z), torch.log2(Y)
    nats = [
        torch.where(owned, label - log_z, math.nan),
        torch.where(owned, teacher_label - log_y, math.nan),
        R / Z - log_z + log_y,
        -F / Y - log_y + log_z,
        log_z - A / Z,
        log_y - C / Y,
    ]
    nats = [_infinite_if_huge(x * LN2) for x in nats]
    rows = torch.stack([*nats, m, log_z, u, log_y], dim=1)
    rows = torch.where((targets_T < 0)[:, None], 0.0, rows)
    return rows.to(partials_RTN.dtype)


def _infinite_if_huge(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() > INFINITE_ABOVE, torch.sign(x) * math.inf, x)
