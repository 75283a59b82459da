"""The op through the compiled libraries; same functions and layout as `torch_ops`."""

from __future__ import annotations

import torch


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """Rows may lie anywhere, columns must be neighbours: a strided shard is read as it is."""
    return x if x.shape[1] < 2 or x.stride(1) == 1 else x.contiguous()


def _ready(student, teacher, targets):
    teacher = None if teacher is None else _rows_contiguous(teacher)
    return _rows_contiguous(student), teacher, targets.long().contiguous()


def vp_stats(student, teacher, targets, vocab_start, valid_cols, inv_temperature) -> torch.Tensor:
    """See `torch_ops.vp_stats`."""
    ready = _ready(student, teacher, targets)
    return torch.ops.sod.vp_stats(*ready, vocab_start, valid_cols, inv_temperature)


def vp_finish(partials: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """See `torch_ops.vp_finish`."""
    return torch.ops.sod.vp_finish(partials.contiguous(), targets.long().contiguous())


def vp_second(student, teacher, targets, rows, valid_cols, inv_temperature, beta) -> torch.Tensor:
    """See `torch_ops.vp_second`."""
    ready = _ready(student, teacher, targets)
    return torch.ops.sod.vp_second(*ready, rows, valid_cols, inv_temperature, beta)


def vp_grad_(
    student,
    teacher,
    targets,
    rows,
    coefficients,
    vocab_start,
    valid_cols,
    inv_temperature,
    beta,
    out=None,
) -> torch.Tensor:
    """See `torch_ops.vp_grad_`."""
    out = student if out is None else out
    ready = _ready(student, teacher, targets)
    target = _rows_contiguous(out)
    arguments = (*ready, rows, coefficients, vocab_start, valid_cols, inv_temperature, beta)
    torch.ops.sod.vp_grad_out(*arguments, target)
    return out if target is out else out.copy_(target)
