"""The op without mutation or hidden state: what torch.compile traces and opcheck inspects.

Same numbers as `differentiable_divergence`, but the gradient is a new tensor: the memory claim is
about the eager path. T tokens, Vp this rank's columns.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives

from megatron_sod.errors import OpError
from megatron_sod.ops.divergence import LOGIT_DTYPES
from megatron_sod.ops.registration import LIBRARY
from megatron_sod.ops.stats import DivergenceStats

# student_logprobs, reverse_kl, forward_kl, student_entropy, jsd differentiate (the order of the
# gradient's coefficients); teacher_logprobs and teacher_entropy do not.
OUTPUTS = (
    "student_logprobs",
    "reverse_kl",
    "forward_kl",
    "student_entropy",
    "jsd",
    "teacher_logprobs",
    "teacher_entropy",
)
_ROW_COLUMNS = {
    "student_logprobs": 0,
    "reverse_kl": 2,
    "forward_kl": 3,
    "student_entropy": 4,
    "teacher_logprobs": 1,
    "teacher_entropy": 5,
}

LIBRARY.define(
    "vp_outputs(Tensor student, Tensor? teacher, Tensor targets, Tensor rows, Tensor second, "
    "int vocab_start, int valid_cols, float inv_temperature, float beta) -> Tensor"
)


def _outputs(student, teacher, targets, rows, second, vocab_start, valid_cols, inv_temp, beta):
    columns = [rows[:, _ROW_COLUMNS.get(name, 0)] for name in OUTPUTS]
    columns[1], columns[2] = columns[1].clamp_min(0), columns[2].clamp_min(0)
    columns[4] = beta * second[:, 1] + (1.0 - beta) * second[:, 0]
    return torch.stack(columns)


LIBRARY.impl("vp_outputs", _outputs, "CompositeExplicitAutograd")


@torch.library.register_fake("sod::vp_outputs", lib=LIBRARY)
def _(student, teacher, targets, rows, second, vocab_start, valid_cols, inv_temp, beta):
    return rows.new_empty((len(OUTPUTS), rows.shape[0]))


def _setup(ctx, inputs, output):
    student, teacher, targets, rows, second, *options = inputs
    ctx.save_for_backward(student, teacher, targets, rows, second)
    ctx.options = options


def _backward(ctx, upstream):
    student, teacher, targets, rows, second = ctx.saved_tensors
    coefficients = torch.cat([upstream[:5], second[None, :, 0]]).t().contiguous().to(rows.dtype)
    grad = torch.ops.sod.vp_grad(student, teacher, targets, rows, coefficients, *ctx.options)
    return grad, *[None] * 8


torch.library.register_autograd("sod::vp_outputs", _backward, setup_context=_setup, lib=LIBRARY)


def functional_divergence(
    student_logits_TVp: torch.Tensor,
    teacher_logits_TVp: torch.Tensor | None,
    target_ids_T: torch.Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    jsd_beta: float | None = None,
) -> DivergenceStats:
    """As `differentiable_divergence`, traceable by torch.compile(fullgraph=True).

    Args:
        target_ids_T: [T] int64.
    Raises:
        OpError: a dtype the op does not serve, or JSD without a teacher. Ids outside the
            vocabulary are not looked for here (that would break the graph): their logprob is NaN.
    Distributed: one functional all-gather over `group`, two for JSD.
    """
    if student_logits_TVp.dtype not in LOGIT_DTYPES or target_ids_T.dtype != torch.int64:
        raise OpError(
            f"logits must be one of {LOGIT_DTYPES} and targets int64; got "
            f"{student_logits_TVp.dtype} and {target_ids_T.dtype}"
        )
    if jsd_beta is not None and teacher_logits_TVp is None:
        raise OpError("jsd_beta needs teacher logits; got None")
    valid_cols = max(0, min(student_logits_TVp.shape[1], vocab_size - vocab_start))
    inv_temperature = 1.0 / temperature
    student = student_logits_TVp.detach()
    teacher = None if teacher_logits_TVp is None else teacher_logits_TVp.detach()
    logits = (student, teacher, target_ids_T)
    partials = torch.ops.sod.vp_stats(*logits, vocab_start, valid_cols, inv_temperature)
    rows = torch.ops.sod.vp_finish(_gathered(partials, group), target_ids_T)
    beta = 0.0 if jsd_beta is None else jsd_beta
    if jsd_beta is None:
        second = rows.new_zeros((rows.shape[0], 4))
    else:
        second = torch.ops.sod.vp_second(*logits, rows, valid_cols, inv_temperature, beta)
        second = _gathered(second, group).double().sum(dim=0).to(rows.dtype)
    outputs = torch.ops.sod.vp_outputs(
        student_logits_TVp,
        *logits[1:],
        rows,
        second,
        vocab_start,
        valid_cols,
        inv_temperature,
        beta,
    )
    fields = dict(zip(OUTPUTS, outputs.unbind(0), strict=True))
    for name in ("teacher_logprobs", "teacher_entropy"):
        fields[name] = fields[name].detach()
    if teacher is None:
        fields = {k: fields[k] for k in ("student_logprobs", "student_entropy")}
    elif jsd_beta is None:
        fields.pop("jsd")
    return DivergenceStats(**fields)


def _gathered(local: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[R, ...] in rank order; a functional collective, so that the graph stays whole."""
    if group is None or dist.get_world_size(group) == 1:
        return local[None]
    world = dist.get_world_size(group)
    return collectives.all_gather_tensor(local, 0, group).reshape(world, *local.shape)
