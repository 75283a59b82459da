"""The field's silent errors under parallelism, put in on purpose. Each is a context manager."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from unittest import mock

import torch

from megatron_sod.parallel.context import held_tokens
from megatron_sod.scoring import certificate
from megatron_sod.train import schedule
from megatron_sod.train.loss import make_loss_fn


def _with_loss(change):
    """Patch the loss function's (sum, count, collected)."""

    def make(model, *args):
        honest = make_loss_fn(model, *args)
        return lambda *call: change(model, *honest(*call))

    return mock.patch.object(certificate, "make_loss_fn", make)


def gradient_times_tp():
    return _with_loss(lambda model, s, n, c: (s * model.pg_collection.tp.size(), n, c))


def mean_of_means():
    """Each micro-batch divides by its own rows, and the means are averaged."""
    return _with_loss(lambda _, s, n, c: (s / n.clamp_min(1), torch.ones_like(n), c))


def dropped_step_at_cp_boundary():
    """Rows whose next token lies on another rank are lost, as when labels are shifted too late."""

    def drop(batch, rank, size):
        if size > 1:
            held = set(held_tokens(batch.cu_seqlens, rank, size).tolist())
            local = honest(batch, rank, size)
            kept = [
                i for i, p in enumerate(local.places.tolist()) if int(batch.rows[p]) + 1 in held
            ]
            names = ("rows", "targets", "step_ids", "trajectory_ids", "rollout_logprobs", "places")
            return replace(local, **{name: getattr(local, name)[kept] for name in names})
        return honest(batch, rank, size)

    honest = schedule.context_part
    return mock.patch.object(schedule, "context_part", drop)


def stale_tied_head():
    """The last stage keeps an older copy of the tied embedding."""

    def load(section, geometry, groups):
        model = honest(section, geometry, groups)
        if groups.pp.rank() > 0:
            with torch.no_grad():
                model.head_weight().mul_(1.01)
        return model

    honest = certificate.load_model
    return mock.patch.object(certificate, "load_model", load)


def whose_gradient_is_not_shared():
    """Sequence-parallel ranks keep their own part of the norms' gradients."""
    from megatron_sod.model.layers import RMSNorm

    honest = RMSNorm.__init__

    def init(self, *args, **kwargs):
        honest(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    return mock.patch.object(RMSNorm, "__init__", init)


FAULTS = {
    "gradient_times_tp": gradient_times_tp,
    "mean_of_means": mean_of_means,
    "dropped_step_at_cp_boundary": dropped_step_at_cp_boundary,
    "stale_tied_head": stale_tied_head,
    "norm_gradients_not_shared": whose_gradient_is_not_shared,
    "none": contextlib.nullcontext,
}
