"""Schemas of the `sod::` operators, their fake implementations and the PyTorch fallback.

The compiled libraries register their kernels against these schemas; a device without a library
gets the functions of `torch_ops`. Validation of user input happens in `divergence`, not here.
"""

from __future__ import annotations

import torch

from megatron_sod.algorithm.step_weights import step_weights as weights_by_policy
from megatron_sod.algorithm.steps import segment_sums, step_keys, token_weights, valid_steps
from megatron_sod.ops import torch_ops
from megatron_sod.ops.stats import NUM_PARTIALS, NUM_ROW_STATS, NUM_SECOND

LIBRARY = torch.library.Library("sod", "DEF")

_SHARD = "int vocab_start, int valid_cols, float inv_temperature"
_LOGITS = "Tensor student, Tensor? teacher, Tensor targets"
_IDS = "Tensor step_ids, Tensor trajectory_ids"
_SIZES = "int num_trajectories, int num_steps"
SCHEMAS = (
    f"vp_stats({_LOGITS}, {_SHARD}) -> Tensor",
    "vp_finish(Tensor partials, Tensor targets) -> Tensor",
    "vp_second(Tensor student, Tensor teacher, Tensor targets, Tensor rows, int valid_cols, "
    "float inv_temperature, float beta) -> Tensor",
    f"vp_grad_out({_LOGITS}, Tensor rows, Tensor coefficients, {_SHARD}, float beta, "
    "Tensor(a!) out) -> ()",
    f"vp_grad({_LOGITS}, Tensor rows, Tensor coefficients, {_SHARD}, float beta) -> Tensor",
    f"step_sums(Tensor values, Tensor? teacher, {_IDS}, {_SIZES}) -> Tensor",
    f"step_weights(Tensor sums, {_SIZES}, float delta, float epsilon) -> (Tensor, Tensor)",
    f"step_gather(Tensor weights, {_IDS}) -> Tensor",
)
for _schema in SCHEMAS:
    LIBRARY.define(_schema)


# --- fake implementations: shapes and dtypes only -------------------------------------------------


@torch.library.register_fake("sod::vp_stats", lib=LIBRARY)
def _(student, teacher, targets, vocab_start, valid_cols, inv_temperature):
    return student.new_empty(
        (student.shape[0], NUM_PARTIALS), dtype=torch_ops.compute_dtype(student)
    )


@torch.library.register_fake("sod::vp_finish", lib=LIBRARY)
def _(partials, targets):
    return partials.new_empty((partials.shape[1], NUM_ROW_STATS))


@torch.library.register_fake("sod::vp_second", lib=LIBRARY)
def _(student, teacher, targets, rows, valid_cols, inv_temperature, beta):
    return student.new_empty((student.shape[0], NUM_SECOND), dtype=torch_ops.compute_dtype(student))


@torch.library.register_fake("sod::vp_grad_out", lib=LIBRARY)
def _(student, teacher, targets, rows, coef, vocab_start, valid_cols, inv_temp, beta, out):
    return None


@torch.library.register_fake("sod::vp_grad", lib=LIBRARY)
def _(student, teacher, targets, rows, coef, vocab_start, valid_cols, inv_temp, beta):
    return student.new_empty(student.shape)


@torch.library.register_fake("sod::step_sums", lib=LIBRARY)
def _(values, teacher, step_ids, trajectory_ids, num_trajectories, num_steps):
    return values.new_empty((2, num_trajectories * num_steps), dtype=torch.float64)


@torch.library.register_fake("sod::step_weights", lib=LIBRARY)
def _(sums, num_trajectories, num_steps, delta, epsilon):
    shape = (num_trajectories, num_steps)
    return tuple(sums.new_empty(shape, dtype=torch.float32) for _ in range(2))


@torch.library.register_fake("sod::step_gather", lib=LIBRARY)
def _(weights, step_ids, trajectory_ids):
    return weights.new_empty(step_ids.shape)


# --- PyTorch implementations ----------------------------------------------------------------------


def _grad(student, teacher, targets, rows, coef, vocab_start, valid_cols, inv_temp, beta):
    out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    torch.ops.sod.vp_grad_out(
        student, teacher, targets, rows, coef, vocab_start, valid_cols, inv_temp, beta, out
    )
    return out


LIBRARY.impl("vp_grad", _grad, "CompositeExplicitAutograd")


def _step_sums(values, teacher, step_ids, trajectory_ids, num_trajectories, num_steps):
    values = values if teacher is None else (values - teacher).abs()
    keys = step_keys(step_ids, trajectory_ids, num_trajectories, num_steps)
    return torch.stack(segment_sums(values, keys, num_trajectories * num_steps))


def _step_weights(sums, num_trajectories, num_steps, delta, epsilon):
    shape = (num_trajectories, num_steps)
    counts = sums[1].reshape(shape)
    d = (sums[0].reshape(shape) / counts.clamp_min(1.0)).float()
    valid = valid_steps(d, counts)
    d = torch.where(valid, d, 0.0)
    return d, weights_by_policy(d, valid, delta=delta, epsilon=epsilon)


def _grad_out(*args):
    torch_ops.vp_grad_(*args)


def implement_in_torch(dispatch_key: str) -> None:
    """Serve every operator of one device with PyTorch."""
    functions = {
        "vp_stats": torch_ops.vp_stats,
        "vp_finish": torch_ops.vp_finish,
        "vp_second": torch_ops.vp_second,
        "vp_grad_out": _grad_out,
        "step_sums": _step_sums,
        "step_weights": _step_weights,
        "step_gather": token_weights,
    }
    for name, function in functions.items():
        LIBRARY.impl(name, function, dispatch_key)
