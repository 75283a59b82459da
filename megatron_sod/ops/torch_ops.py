"""The op in PyTorch: what serves where no compiled library does. Same sums, same layout.

T tokens, Vp this rank's columns. Works through blocks of rows, so that no [T, Vp] temporary
exists. Columns at or after `valid_cols` are padding: never read, gradient exactly 0.
"""

from __future__ import annotations

import math

import torch

from megatron_sod.ops.stats import (
    LN2,
    LOG2E,
    NOT_MINE,
    NUM_PARTIALS,
    NUM_SECOND,
    SENTINEL,
    finish_rows,
)

BLOCK_ELEMENTS = 1 << 20  # temporaries stay below about 100 MB whatever T and Vp are


def compute_dtype(logits: torch.Tensor) -> torch.dtype:
    """float64 logits are worked on in float64, all others in float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _row_blocks(num_rows: int, num_cols: int):
    step = max(1, BLOCK_ELEMENTS // max(num_cols, 1))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _scaled(logits: torch.Tensor, scale: float, shift: torch.Tensor) -> torch.Tensor:
    # In float64 then rounded once, as a fused multiply-add does: at logits of 1e4 a product
    # rounded to float32 would already be off by 8e-4.
    scaled = logits.double() * scale - shift.double()[:, None]
    return scaled.clamp_min(SENTINEL).to(compute_dtype(logits))


def _shard_max(logits: torch.Tensor, scale: float) -> torch.Tensor:
    if logits.shape[1] == 0:
        return logits.new_full((logits.shape[0],), SENTINEL, dtype=compute_dtype(logits))
    largest = torch.nan_to_num(logits.amax(dim=1).double(), nan=0.0, posinf=math.inf, neginf=None)
    return (largest * scale).clamp_min(SENTINEL).to(compute_dtype(logits))


def vp_stats(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    targets: torch.Tensor,
    vocab_start: int,
    valid_cols: int,
    inv_temperature: float,
) -> torch.Tensor:
    """[T, 10] partial sums of this rank's columns; columns as in `ops.stats`."""
    out = student.new_empty((student.shape[0], NUM_PARTIALS), dtype=compute_dtype(student))
    scale = LOG2E * inv_temperature
    for block in _row_blocks(student.shape[0], valid_cols):
        z = student[block, :valid_cols]
        y = None if teacher is None else teacher[block, :valid_cols]
        local = targets[block] - vocab_start
        out[block] = _block_partials(z, y, local, scale)
        # every element is written, ignored rows too, without what their logits hold
        out[block][targets[block] < 0] = _empty_partials(out)
    return out


def _empty_partials(like: torch.Tensor) -> torch.Tensor:
    values = [SENTINEL, 0, 0, 0, SENTINEL, 0, 0, 0, NOT_MINE, NOT_MINE]
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def _block_partials(z, y, local, scale) -> torch.Tensor:
    m = _shard_max(z, scale)
    zs = _scaled(z, scale, m)
    ez = torch.exp2(zs)
    if y is None:
        u, ys, ey = torch.full_like(m, SENTINEL), zs, torch.zeros_like(zs)
    else:
        u = _shard_max(y, scale)
        ys = _scaled(y, scale, u)
        ey = torch.exp2(ys)
    gap = zs - ys
    mine = (local >= 0) & (local < z.shape[1])
    index = torch.where(mine, local, 0)[:, None]
    absent = torch.full_like(m, NOT_MINE)
    label = torch.where(mine, zs.gather(1, index)[:, 0], absent) if z.shape[1] else absent
    teacher_label = torch.where(mine, ys.gather(1, index)[:, 0], absent) if z.shape[1] else absent
    sums = [ez.sum(1), (ez * zs).sum(1), (ez * gap).sum(1)]
    teacher_sums = [ey.sum(1), (ey * ys).sum(1), (ey * gap).sum(1)]
    return torch.stack([m, *sums, u, *teacher_sums, label, teacher_label], dim=1)


def vp_finish(partials: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[R, T, 10] -> [T, 10]; see `ops.stats.finish_rows`."""
    return finish_rows(partials, targets)


def vp_second(
    student: torch.Tensor,
    teacher: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor,
    valid_cols: int,
    inv_temperature: float,
    beta: float,
) -> torch.Tensor:
    """[T, 4] sums that need the finished normalisers; this rank's columns; nats.

    0: sum p (lp - lM)   1: sum q (lq - lM)   2: sum p (e^d - 1 - d), d = lq - lp (reverse KL)
    3: sum q (e^-d - 1 + d) (forward KL). 2 and 3 are sums of terms >= 0: no cancellation, so a
    divergence of 1e-9 keeps its digits.
    """
    out = student.new_zeros((student.shape[0], NUM_SECOND), dtype=compute_dtype(student))
    scale = LOG2E * inv_temperature
    for block in _row_blocks(student.shape[0], valid_cols):
        lp = _log_probs(student[block, :valid_cols], scale, rows[block, 6], rows[block, 7])
        lq = _log_probs(teacher[block, :valid_cols], scale, rows[block, 8], rows[block, 9])
        p, q = torch.exp2(lp), torch.exp2(lq)
        log_mix = torch.log2(((1.0 - beta) * p + beta * q).clamp_min(2.0**-126))
        d = (lq - lp) * LN2
        small = d.abs() < 0.05
        near = torch.where(small, d, 0.0)
        series = near * near * (0.5 + near * (1 / 6 + near * (1 / 24 + near / 120)))
        mirrored = near * near * (0.5 - near * (1 / 6 - near * (1 / 24 - near / 120)))
        reverse = torch.where(small, p * series, q - p - p * d)
        forward = torch.where(small, q * mirrored, p - q + q * d)
        sums = [(p * (lp - log_mix)).sum(1) * LN2, (q * (lq - log_mix)).sum(1) * LN2]
        out[block] = torch.stack([*sums, reverse.sum(1), forward.sum(1)], dim=1)
        out[block][targets[block] < 0] = 0
    return out


def _log_probs(logits, scale, shift, log_sum) -> torch.Tensor:
    """log2 probabilities, finite (SENTINEL) where the logit is -inf."""
    return _scaled(logits, scale, shift) - log_sum[:, None]


def vp_grad_(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    targets: torch.Tensor,
    rows: torch.Tensor,
    coefficients: torch.Tensor,
    vocab_start: int,
    valid_cols: int,
    inv_temperature: float,
    beta: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write d(sum of coefficient * statistic) / d(student logits) into `out` (default: student).

    Args:
        coefficients: [T, 6] c_logprob, c_reverse, c_forward, c_entropy, c_jsd and the row's
            sum p (lp - lM); each row has its own. Ignored rows, and rows whose coefficients are
            all 0, get exactly 0 whatever their logits hold (NaN included).
    """
    out = student if out is None else out
    scale = LOG2E * inv_temperature
    for block in _row_blocks(student.shape[0], valid_cols):
        z = student[block, :valid_cols]
        y = None if teacher is None else teacher[block, :valid_cols]
        stats, coef = rows[block], coefficients[block]
        grad = _block_gradient(z, y, stats, coef, scale, beta)
        local = targets[block] - vocab_start
        mine = (local >= 0) & (local < valid_cols)
        if valid_cols:
            at_label = torch.where(mine, coef[:, 0], 0.0)
            grad.scatter_add_(1, torch.where(mine, local, 0)[:, None], at_label[:, None])
        idle = (targets[block] < 0) | (coef[:, :5] == 0).all(dim=1)
        grad = torch.where(idle[:, None], 0.0, grad * inv_temperature)
        out[block, :valid_cols] = grad.to(out.dtype)
        out[block, valid_cols:] = 0
    return out


def _block_gradient(z, y, stats, coef, scale, beta) -> torch.Tensor:
    c_logprob, c_reverse, c_forward, c_entropy, c_jsd, mix = (c[:, None] for c in coef.unbind(1))
    _, _, reverse, forward, entropy, _, m, log_z, u, log_y = (s[:, None] for s in stats.unbind(1))
    lp = _log_probs(z, scale, m[:, 0], log_z[:, 0])
    p = torch.exp2(lp)
    per_p = -c_logprob - c_entropy * (lp * LN2 + entropy)
    if y is None:
        return p * per_p
    # An infinite divergence has no finite gradient: such a row keeps its other terms only.
    finite_reverse, finite_forward = ~torch.isinf(reverse), ~torch.isinf(forward)
    c_reverse = torch.where(finite_reverse, c_reverse, 0.0)
    reverse = torch.where(finite_reverse, reverse, 0.0)
    c_forward = torch.where(finite_forward, c_forward, 0.0)
    lq = _log_probs(y, scale, u[:, 0], log_y[:, 0])
    q = torch.exp2(lq)
    per_p = per_p + c_reverse * ((lp - lq) * LN2 - reverse) + c_forward
    if bool((c_jsd != 0).any()):
        log_mix = torch.log2(((1.0 - beta) * p + beta * q).clamp_min(2.0**-126))
        per_p = per_p + c_jsd * (1.0 - beta) * ((lp - log_mix) * LN2 - mix)
    return p * per_p - c_forward * q
