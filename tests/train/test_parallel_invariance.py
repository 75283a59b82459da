"""One batch, fixed weights: loss, d_k, w_k and every gradient are the same in every layout.

Layers: gloo on 1, 2 and 4 CPU ranks, in float64. The pure arithmetic is tested in algorithm/ and
scoring/, the op itself in ops/.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny import sod_config, synthetic_trajectories, write_model_with_weights

TOLERANCE = 1e-10
TP2 = dict(tensor_model_parallel_size=2)
PP2 = dict(pipeline_model_parallel_size=2)
# name: (ranks, parallel section, tokens per micro-batch, loss)
JOBS = {
    "single": (1, {}, 10_000, "sampled_advantage"),
    "single_jsd": (1, {}, 10_000, "jsd"),
    "tp2": (2, TP2, 10_000, "sampled_advantage"),
    "tp2_sp": (2, {**TP2, "sequence_parallel": True}, 10_000, "sampled_advantage"),
    "pp2": (2, PP2, 10_000, "sampled_advantage"),
    "dp2": (2, {}, 10_000, "sampled_advantage"),
    "tp2_split": (2, TP2, 60, "sampled_advantage"),
    "pp2_split": (2, PP2, 60, "sampled_advantage"),
    "dp2_split": (2, {}, 60, "sampled_advantage"),
    "tp2_pp2": (4, {**TP2, **PP2}, 10_000, "sampled_advantage"),
    "tp2_pp2_jsd": (4, {**TP2, **PP2}, 80, "jsd"),
}
LAYOUTS = [name for name in JOBS if not name.startswith("single") and "jsd" not in name]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    student = write_model_with_weights(folder / "student", seed=1, dtype=torch.float64)
    teacher = write_model_with_weights(
        folder / "teacher", seed=2, dtype=torch.float64, num_hidden_layers=4, hidden_size=128
    )
    return str(student), str(teacher)


@pytest.fixture(scope="module")
def measured(models):
    """Rank 0's result of every job; jobs that need the same ranks share one start."""
    results: dict[str, dict] = {}
    for ranks in (1, 2, 4):
        jobs = {name: job[1:] for name, job in JOBS.items() if job[0] == ranks}
        results |= run_on_ranks(ranks, _run_jobs, models, jobs)[0]
    return results


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_is_unchanged_by_layout_and_micro_batch_split(measured, layout):
    assert_same(measured[layout], measured["single"])


@pytest.mark.dist
def test_split_jobs_really_have_several_micro_batches(measured):
    assert measured["single"]["num_micro_batches"] == 1
    assert measured["tp2_split"]["num_micro_batches"] > 2


@pytest.mark.dist
def test_exact_divergence_gradient_is_unchanged_by_tensor_and_pipeline_parallel(measured):
    assert_same(measured["tp2_pp2_jsd"], measured["single_jsd"])


@pytest.mark.dist
def test_a_gradient_that_is_scaled_by_tp_size_would_be_noticed(measured):
    """The comparison above can fail: the field's signature bug, applied on purpose."""
    truth = measured["single"]
    faulty = {**truth, "grads": {n: 2.0 * g for n, g in truth["grads"].items()}}
    with pytest.raises(AssertionError, match="grad"):
        assert_same(faulty, truth)


def assert_same(found: dict, truth: dict) -> None:
    assert abs(found["loss"] - truth["loss"]) <= TOLERANCE, "loss"
    assert found["steps"].keys() == truth["steps"].keys()
    for name, values in truth["steps"].items():
        assert found["steps"][name] == pytest.approx(values, abs=TOLERANCE), f"d, w of {name}"
    assert found["grads"].keys() == truth["grads"].keys()
    for name, grad in truth["grads"].items():
        error = float((found["grads"][name] - grad).abs().max())
        assert error <= TOLERANCE, f"grad of {name}: {error}"
        assert float(grad.abs().max()) > 0, f"grad of {name} is zero: the comparison says nothing"


def _run_jobs(models, jobs: dict) -> dict:
    return {name: _iteration(models, *job) for name, job in jobs.items()}


def _iteration(models, parallel: dict, tokens_per_micro_batch: int, loss: str) -> dict:
    """Score, credit and gradient of one mini-batch on this rank; complete on rank 0."""
    from megatron_sod.data.batch import build_training_batch
    from megatron_sod.data.packing import alignment_of
    from megatron_sod.model.build import build_model
    from megatron_sod.model.geometry import load_geometry
    from megatron_sod.model.weights import gather_hf_tensors, load_hf_weights, main_grad
    from megatron_sod.parallel import state
    from megatron_sod.scoring.credit import assign_credit
    from megatron_sod.scoring.score import score
    from megatron_sod.scoring.teacher import Teacher
    from megatron_sod.train.loss import make_loss_fn
    from megatron_sod.train.trainable import Trainable

    role = {"dtype": "float64", "parallel": parallel}
    config = sod_config(
        *models,
        student={"path": models[0], **role},
        teacher={"path": models[1], **role},
        distill={"loss": loss},
        rollout={"correct_mismatch": True},
        # The distributed optimizer leaves each rank its shard of the gradient only.
        train={
            "num_iterations": 1,
            "train_batch_size": 4,
            "ppo_mini_batch_size": 2,
            "use_distributed_optimizer": False,
        },
    )
    state.initialize(config.student.parallel, seed=0)
    groups = state.process_groups()
    built = []
    for section in (config.student, config.teacher):
        geometry = load_geometry(section.path)
        model = build_model(geometry, section.parallel, groups, dtype="float64")
        load_hf_weights(model, geometry, section.path)
        built.append((model, geometry))
    (student_model, geometry), (teacher_model, _) = built
    student = Trainable(student_model, geometry, config.train)
    batch = build_training_batch(
        synthetic_trajectories(3, 3, vocab_size=geometry.vocab_size, seed=5),
        num_mini_batches=1,
        tokens_per_micro_batch=tokens_per_micro_batch,
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        alignment=alignment_of(config.student.parallel),
    )
    micro_batches = batch.mini_batches[0].micro_batches
    teacher = Teacher(teacher_model, groups)
    scores = score(student_model, teacher, micro_batches, temperature=1.0, keep_teacher_hidden=True)
    credits, steps = [], None
    if state.is_last_stage(groups):
        credits, steps = assign_credit(batch, micro_batches, scores, config)
    loss_fn = make_loss_fn(student_model, teacher, credits, scores, config)
    collected = student.accumulate(micro_batches, loss_fn)
    sums = torch.zeros(2, dtype=torch.float64)
    for item in collected:
        sums += torch.stack([item["loss"], item["rows"]])
    for group in (groups.dp, groups.pp):
        dist.all_reduce(sums, group=group)
    grads = dict(gather_hf_tensors(student_model, geometry, main_grad))
    table = {}
    if steps is not None:
        for index, trajectory in enumerate(batch.trajectories):
            rows = torch.stack([steps.step_divergence[index], steps.step_weights[index]])
            table[trajectory.trajectory_id] = rows[:, : len(trajectory.steps)].flatten().tolist()
    tables: list = [None] * dist.get_world_size()
    dist.all_gather_object(tables, table)
    state.parallel_state.destroy_model_parallel()
    return {
        "loss": float(sums[0] / sums[1]),
        "steps": {name: row for part in tables for name, row in part.items()},
        "grads": grads,
        "num_micro_batches": len(micro_batches),
    }
