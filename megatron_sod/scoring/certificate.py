"""The invariance certificate: one batch, fixed weights, the same numbers in every layout.

Loss, step divergences d_k, step weights w_k, every token's scores and every parameter's gradient
are measured in a layout and compared with those of a single process. Silent errors under
parallelism leave loss curves that look right; they do not pass here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_sod.config.schema import SodConfig
from megatron_sod.convert.layout import sharding_of
from megatron_sod.data.batch import build_training_batch
from megatron_sod.data.packing import alignment_of
from megatron_sod.data.synthetic import synthetic_trajectories
from megatron_sod.model.geometry import load_geometry
from megatron_sod.model.gpt import PipelineModel
from megatron_sod.model.parity import shared_vocab_size
from megatron_sod.model.weights import gather_hf_tensors, load_model, main_grad
from megatron_sod.parallel import state
from megatron_sod.scoring.credit import assign_credit
from megatron_sod.scoring.score import score
from megatron_sod.scoring.teacher import open_teacher
from megatron_sod.train.loss import make_loss_fn
from megatron_sod.train.trainable import Trainable
from megatron_sod.types import TokenCredit

ONE_MICRO_BATCH = 10_000  # tokens; more than the batch has


@dataclass(frozen=True)
class Case:
    """One way to compute the batch."""

    ranks: int
    student: dict[str, Any] = field(default_factory=dict)  # the `parallel` section
    teacher: dict[str, Any] | None = None  # None: the student's
    tokens_per_micro_batch: int = ONE_MICRO_BATCH
    loss: str = "sampled_advantage"
    recompute: str = "none"


@dataclass(frozen=True)
class Measurement:
    """What a case gives, complete on global rank 0."""

    loss: float
    steps: dict[str, torch.Tensor]  # trajectory -> [2, K] d_k and w_k
    logprobs: dict[str, torch.Tensor]  # trajectory -> [2, tokens] of student and teacher
    gradients: dict[str, torch.Tensor]  # HF tensor -> its gradient
    copies: float  # largest difference between ranks that hold the same parameter's gradient
    num_micro_batches: int  # of this rank

    def errors(self, truth: Measurement) -> dict[str, float]:
        """Largest absolute difference per quantity; infinite where something is missing."""
        d, w = ({n: rows[i] for n, rows in self.steps.items()} for i in (0, 1))
        true_d, true_w = ({n: rows[i] for n, rows in truth.steps.items()} for i in (0, 1))
        return {
            "loss": abs(self.loss - truth.loss),
            "scores": _difference(self.logprobs, truth.logprobs),
            "d_k": _difference(d, true_d),
            "w_k": _difference(w, true_w),
            "gradients": _difference(self.gradients, truth.gradients),
            "copies": self.copies,
        }


def _difference(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    if found.keys() != truth.keys() or any(found[n].shape != truth[n].shape for n in truth):
        return float("inf")
    worst = max((float((found[n] - truth[n]).abs().max()) for n in truth), default=float("inf"))
    return worst if worst == worst else float("inf")  # a NaN is no agreement


def measure(case: Case, student_dir: str, teacher_dir: str) -> Measurement:
    """Score, credit and gradient of one mini-batch in float64. A collective over all ranks."""
    config = _config(case, student_dir, teacher_dir)
    assert config.teacher is not None
    sections = (config.student, config.teacher)
    geometry, teacher_geometry = (load_geometry(section.path) for section in sections)
    state.initialize(config.student.parallel, seed=0)
    groups = state.process_groups()
    student = Trainable(load_model(config.student, geometry, groups), geometry, config.train)
    student.model.real_vocab_size = shared_vocab_size(geometry, teacher_geometry)
    teacher = open_teacher(
        config.teacher, config.student, teacher_geometry, groups, vocab_size=geometry.vocab_size
    )
    batch = build_training_batch(
        synthetic_trajectories(3, 3, vocab_size=student.model.real_vocab_size, seed=5),
        num_mini_batches=1,
        tokens_per_micro_batch=case.tokens_per_micro_batch,
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        alignment=alignment_of(*(section.parallel for section in sections)),
    )
    micro_batches = batch.mini_batches[0].micro_batches
    scores = score(student.model, teacher, micro_batches, temperature=1.0, keep_teacher_hidden=True)
    credits: list[TokenCredit] = []
    steps, logprobs = None, {}
    if state.is_last_stage(groups):
        credits, steps = assign_credit(batch, micro_batches, scores, config)
        logprobs = _logprobs(batch, micro_batches, scores)
    loss_fn = make_loss_fn(student.model, teacher, credits, scores, config)
    sums = torch.zeros(2, dtype=torch.float64)
    for collected in student.accumulate(micro_batches, loss_fn):
        sums += torch.stack([collected["loss"], collected["rows"]])
    for group in (groups.dp_cp, groups.pp):
        dist.all_reduce(sums, group=group)
    result = Measurement(
        loss=float(sums[0] / sums[1]),
        steps=_merged({} if steps is None else _step_table(batch, steps)),
        logprobs=_merged(logprobs),
        gradients=dict(gather_hf_tensors(student.model, geometry, main_grad)),
        copies=_copies(student.model),
        num_micro_batches=len(micro_batches),
    )
    if teacher.model.pg_collection is not groups:
        with state.own_groups(teacher.model.pg_collection):
            state.release_groups()
    state.release_groups()
    return result


def _config(case: Case, student_dir: str, teacher_dir: str) -> SodConfig:
    role = {"dtype": "float64", "recompute": case.recompute}
    teacher = case.student if case.teacher is None else case.teacher
    return SodConfig.model_validate(
        {
            "student": {"path": student_dir, "parallel": case.student, **role},
            "teacher": {"path": teacher_dir, "parallel": teacher, **role},
            "distill": {"loss": case.loss},
            "data": {"train": ["tiny_world:train:8"]},
            # the distributed optimizer would leave each rank its shard of the gradient only
            "train": {"num_iterations": 1, "use_distributed_optimizer": False},
        }
    )


def _step_table(batch, steps) -> dict[str, torch.Tensor]:
    both = torch.stack([steps.step_divergence, steps.step_weights], dim=1).double()
    return {
        trajectory.trajectory_id: both[index, :, : len(trajectory.steps)]
        for index, trajectory in enumerate(batch.trajectories)
    }


def _logprobs(batch, micro_batches, scores) -> dict[str, torch.Tensor]:
    table = {}
    for micro_batch, scored in zip(micro_batches, scores, strict=True):
        both = torch.stack([scored.student_logprobs, scored.teacher_logprobs])
        for index in micro_batch.trajectory_ids.unique().tolist():
            name = batch.trajectories[index].trajectory_id
            table[name] = both[:, micro_batch.trajectory_ids == index]
    return table


def _merged(mine: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All ranks' tables in one; equal keys hold equal rows."""
    tables: list[dict[str, torch.Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(tables, mine)
    return {name: rows for table in tables for name, rows in table.items()}


def _copies(model: PipelineModel) -> float:
    """Ranks that hold the same numbers must reduce them to the same gradient."""
    groups, worst = model.pg_collection, torch.zeros(1, dtype=torch.float64)
    for name, parameter in model.global_parameters():
        sharding = sharding_of(name)
        holders = [groups.expt_dp] if sharding == "expert" else [groups.dp_cp]
        holders += [groups.tp] if sharding == "replicated" else []
        for group in holders:
            high, low = main_grad(parameter).clone(), main_grad(parameter).clone()
            dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
            dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
            worst = torch.maximum(worst, (high - low).max().double())
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)
