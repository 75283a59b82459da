"""Prompts and observations never get logits: the output heads see the rows that carry loss.

Layer: gloo on one CPU rank, float64. Other layouts: test_certificate.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny import synthetic_trajectories, write_model_with_weights

VOCAB = 384


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("heads")
    models = [
        str(write_model_with_weights(folder / name, seed=seed, dtype=torch.float64))
        for seed, name in enumerate(("student", "teacher"), 1)
    ]
    return run_on_ranks(1, _score, *models)[0]


@pytest.mark.dist
def test_the_heads_see_only_rows_that_carry_loss(scored):
    assert scored["head_rows"] == [scored["loss_rows"]] * 2  # the student's and the teacher's
    assert scored["loss_rows"] < 0.7 * scored["tokens"]


@pytest.mark.dist
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_their_scores_are_those_of_heads_over_all_rows(scored, model):
    few, all_rows = scored[model]
    assert torch.allclose(few, all_rows, rtol=0, atol=1e-12)


def _score(student_dir: str, teacher_dir: str) -> dict:
    from dataclasses import replace
    from unittest import mock

    from megatron_sod.data.batch import build_training_batch
    from megatron_sod.model.geometry import load_geometry
    from megatron_sod.model.weights import load_model
    from megatron_sod.parallel import state
    from megatron_sod.scoring.score import score
    from megatron_sod.scoring.teacher import open_teacher
    from tests.helpers.tiny import sod_config

    config = sod_config(
        student_dir, teacher_dir,
        student={"path": student_dir, "dtype": "float64"},
        teacher={"path": teacher_dir, "dtype": "float64"},
    )  # fmt: skip
    state.initialize(config.student.parallel, seed=0)
    groups = state.process_groups()
    student = load_model(config.student, load_geometry(student_dir), groups)
    teacher = open_teacher(
        config.teacher, config.student, load_geometry(teacher_dir), groups, vocab_size=VOCAB
    )
    trajectories = synthetic_trajectories(3, 2, vocab_size=VOCAB, seed=5)
    batch = build_training_batch(
        trajectories, num_mini_batches=1, tokens_per_micro_batch=10_000, dp_rank=0, dp_size=1
    )
    (micro,) = batch.mini_batches[0].micro_batches
    seen: list[int] = []
    linear = torch.nn.functional.linear

    def noting(values, weight, *rest):
        if weight.shape[0] >= VOCAB:
            seen.append(len(values))
        return linear(values, weight, *rest)

    with mock.patch("torch.nn.functional.linear", noting):
        (few,) = score(student, teacher, [micro], temperature=0.8)
    tokens = micro.token_ids[0]
    every = replace(
        micro,
        rows=torch.arange(len(tokens) - 1),
        targets=tokens[1:],
        step_ids=torch.ones(len(tokens) - 1, dtype=torch.int64),
        trajectory_ids=torch.zeros(len(tokens) - 1, dtype=torch.int64),
        rollout_logprobs=torch.zeros(len(tokens) - 1),
    )
    (whole,) = score(student, teacher, [every], temperature=0.8)
    return {
        "head_rows": seen,
        "loss_rows": len(micro.rows),
        "tokens": len(tokens),
        "student": (few.student_logprobs, whole.student_logprobs[micro.rows]),
        "teacher": (few.teacher_logprobs, whole.teacher_logprobs[micro.rows]),
    }
