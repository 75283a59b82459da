"""A run from a converted Megatron checkpoint; its student has more rows than its teacher.

Layers: one real run of one iteration on two ranks, with Ray, a vLLM engine and the sandbox, checked
from its files. The numbers of such pairs: tests/scoring/test_teacher.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_sod.config.schema import ParallelConfig
from megatron_sod.convert.to_megatron import convert_hf_to_megatron
from megatron_sod.data.tiny_models import TEACHER, VOCAB_SIZE, write_tiny_model
from megatron_sod.rollout.recording import Recording
from tests.helpers.launch import run
from tests.helpers.tiny import write_model_with_weights

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600)]

ROWS = VOCAB_SIZE + 70  # a random student would sample one of the 70 every seven tokens


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    write_model_with_weights(folder / "hf", seed=5, vocab_size=ROWS)
    cut = ParallelConfig(pipeline_model_parallel_size=2)
    convert_hf_to_megatron(folder / "hf", folder / "student", parallel=cut)
    write_tiny_model(folder / "teacher", **TEACHER)
    run(
        "train_sod.py",
        "--config",
        "configs/demo_cpu.yaml",
        "name=converted",
        f"observe.run_dir={folder / 'run'}",
        f"student.path={folder / 'student'}",
        f"teacher.path={folder / 'teacher'}",
        "student.parallel.tensor_model_parallel_size=2",
        "data.train=[tiny_world:train:32]",
        "data.eval=[tiny_world:heldout:4]",
        "eval.teacher=false",
        "train.num_iterations=1",
        "train.train_batch_size=4",
        "train.ppo_mini_batch_size=2",
        "rollout.num_generations=2",
        "rollout.max_turns=2",
        "rollout.max_response_length=96",
        "rollout.timeout_s=200",
        "rollout.record=true",
        nproc=2,
        log=folder / "run.log",
        timeout_s=500,
    )
    return folder


def test_the_engines_hold_the_shared_rows_and_sample_no_other(finished):
    row = json.loads((finished / "run/metrics.jsonl").read_text())
    assert 0 <= row["transfer/canary_max_error"] < 1e-3
    trajectories = Recording(finished / "run/rollouts").read(1)
    sampled = [
        token
        for t in trajectories
        for token, is_own in zip(t.response_token_ids, t.loss_mask, strict=True)
        if is_own
    ]
    assert len(sampled) > 100 and max(sampled) < VOCAB_SIZE


def test_the_iteration_trains(finished):
    row = json.loads((finished / "run/metrics.jsonl").read_text())
    assert row["actor/steps_skipped"] == 0 and row["actor/grad_norm"] > 0


def test_the_export_has_all_rows_and_loads_in_transformers(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "run/hf", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(finished / "hf", dtype=torch.float32)
    rows, before = (m.get_input_embeddings().weight for m in (model, start))
    assert len(rows) == ROWS and not torch.equal(rows[:VOCAB_SIZE], before[:VOCAB_SIZE])
    tokenizer = AutoTokenizer.from_pretrained(finished / "run/hf")
    logits = model(torch.tensor([tokenizer("Compute")["input_ids"]])).logits
    assert torch.isfinite(logits).all()
