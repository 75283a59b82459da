"""Planned bytes against the tensors a real Trainable allocates, at TP2, PP2 and DP2.

Layers: counting on paper, then Megatron on gloo ranks with a tiny model. What the numbers of the
shipped configurations are is left to test_shipped_plans.
"""

from pathlib import Path

import pytest
import torch

from megatron_sod.config.load import load_config
from megatron_sod.config.schema import ParallelConfig, SodConfig
from megatron_sod.data.tiny_models import write_tiny_model
from megatron_sod.plan.geometries import shipped_geometry
from megatron_sod.plan.job import PlannedModel, job_of
from megatron_sod.plan.memory import PHASES, Stage, activation_bytes, logit_bytes, stage_memory
from megatron_sod.plan.parameters import rank_parameters, total_parameters
from megatron_sod.plan.resident import training_state
from megatron_sod.plan.roles import trainer_roles
from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny import sod_config

TOKENS = 37
WORLD_SIZE = 4
# (tensor, pipeline; data takes the rest), dtype, distributed optimizer, tied head
CASES = {
    "tp2 dp2": ((2, 1), "float32", True, True),
    "pp2 dp2": ((1, 2), "bfloat16", True, True),
    "tp2 pp2": ((2, 2), "float32", False, False),
    "dp4": ((1, 1), "bfloat16", True, False),
    "dp4, whole optimizer": ((1, 1), "bfloat16", False, True),
}


def _config(folder: str, case: str) -> SodConfig:
    (tp, pp), dtype, distributed, tied = CASES[case]
    path = f"{folder}/{'tied' if tied else 'untied'}"
    parallel = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    train = {"num_iterations": 1, "train_batch_size": 4, "ppo_mini_batch_size": 2}
    return sod_config(
        path,
        path,
        student={"path": path, "dtype": dtype, "parallel": parallel},
        train={**train, "use_distributed_optimizer": distributed},
        cluster={"gpus_per_node": WORLD_SIZE},
    )


def _all_measured(folder: str) -> dict[str, dict[str, int]]:
    return {case: _measured(_config(folder, case)) for case in CASES}


def _measured(config: SodConfig) -> dict[str, int]:
    """Bytes of the tensors after one optimizer step on zero gradients, and of the logits."""
    from megatron.core import parallel_state

    from megatron_sod.model.build import build_model
    from megatron_sod.model.geometry import load_geometry
    from megatron_sod.parallel import state
    from megatron_sod.train.trainable import Trainable

    parallel = config.student.parallel
    state.initialize(parallel, seed=0)
    groups = state.process_groups()
    geometry = load_geometry(config.student.path)
    model = build_model(geometry, parallel, groups, dtype=config.student.dtype)
    trainable = Trainable(model, geometry, config.train)
    (ddp,) = trainable.ddp_chunks
    ddp.zero_grad_buffer()
    trainable.optimizer.step()
    logits = 0
    if groups.pp.rank() == groups.pp.size() - 1:
        hidden = torch.zeros(TOKENS, 1, geometry.hidden_size, dtype=model.config.params_dtype)
        logits = _bytes([model.output_logits(hidden, torch.arange(TOKENS))])
    buffers = ddp.buffers + ddp.expert_parallel_buffers
    parallel_state.destroy_model_parallel()
    return {
        "weights": _bytes(model.parameters()),
        "gradients": _bytes(buffer.grad_data for buffer in buffers),
        "optimizer": _optimizer_bytes(trainable.optimizer, model),
        "logits": logits,
    }


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _optimizer_bytes(optimizer, model) -> int:
    """Adam's moments, and the float32 weights where they are not the model's own."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tensors = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            masters = [p for p in group["params"] if p.untyped_storage().data_ptr() not in own]
            tensors += masters
        for state in part.optimizer.state.values():
            tensors += [value for key, value in state.items() if key.startswith("exp_avg")]
    return _bytes(tensors)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[str, list[dict]]:
    folder = tmp_path_factory.mktemp("models")
    # 600 rows do not divide by 128 x TP: Megatron pads them
    sizes = {"hidden_size": 96, "intermediate_size": 320, "vocab_size": 600}
    for tied in (True, False):
        directory = folder / ("tied" if tied else "untied")
        write_tiny_model(directory, **sizes, tie_word_embeddings=tied)
    return str(folder), run_on_ranks(WORLD_SIZE, _all_measured, str(folder))


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_planned_bytes_are_the_measured_ones(measured, case):
    folder, by_rank = measured
    config = _config(folder, case)
    job = job_of(config)
    for role in trainer_roles(config.cluster, config.student.parallel):
        found = by_rank[role.rank][case]
        weights, gradients, optimizer = training_state(job, role.pp)
        assert weights == pytest.approx(found["weights"], rel=0.02)
        assert gradients == pytest.approx(found["gradients"], rel=0.02)
        assert optimizer == pytest.approx(found["optimizer"], rel=0.02)
        if found["logits"]:
            assert logit_bytes(job, job.student, TOKENS) == found["logits"]


def test_stages_add_up_to_the_model_and_the_copies_it_needs():
    geometry = shipped_geometry("qwen3-1.7b")
    stages = [
        rank_parameters(geometry, ParallelConfig(pipeline_model_parallel_size=4), pp)
        for pp in range(4)
    ]
    head = 151_936 * 2048  # the last stage's copy of the tied head; 128 divides the rows
    assert sum(stage.total for stage in stages) == total_parameters(geometry) + head


def test_experts_are_spread_over_expert_ranks_only():
    geometry = shipped_geometry("qwen3-30b-a3b")
    one = rank_parameters(geometry, ParallelConfig(), 0)
    eight = rank_parameters(geometry, ParallelConfig(expert_model_parallel_size=8), 0)
    assert eight.dense == one.dense and eight.expert * 8 == one.expert
    # 48 layers x 128 experts x 3 matrices of 768 x 2048
    assert one.expert == 48 * 128 * 3 * 768 * 2048


def test_full_recomputation_keeps_one_input_per_layer():
    """Qwen3-0.6B: hidden 1024, 28 layers, bfloat16: 2 * 1024 * 28 bytes per token on one stage."""
    geometry = shipped_geometry("qwen3-0.6b")
    plain = PlannedModel("", geometry, ParallelConfig(), "bfloat16")
    again = PlannedModel("", geometry, ParallelConfig(), "bfloat16", recompute="full")
    assert activation_bytes(again, tokens=10, pp_rank=0) == 10 * 2 * 1024 * 28
    assert activation_bytes(plain, tokens=10, pp_rank=0) > 10 * activation_bytes(
        again, tokens=10, pp_rank=0
    )


def _planned(train=None, teacher=None):
    paper = Path(__file__).parents[2] / "configs/sod_qwen3-1.7b_qwen3-4b_1n8g_tp2.yaml"
    given = [f"train.{key}=true" for key in train or ()]
    given += ["teacher.param_offload=true"] if teacher else []
    job = job_of(load_config(paper, given))
    return stage_memory(job, Stage(0, 0, True))


def test_what_waits_on_the_host_is_planned_only_where_it_is_held():
    plain = _planned()
    moved = _planned(train=("param_offload", "optimizer_offload"), teacher=True)
    parts = ("weights", "gradients", "optimizer", "teacher")
    held = {phase: [name for name in parts if moved[phase].get(name)] for phase in PHASES}
    assert held["train"] == ["weights", "gradients", "optimizer", "teacher"]
    assert held["rollout"] == ["teacher"], "the head the exact losses need"
    assert held["transfer"] == ["weights", "teacher"]
    assert held["save"] == held["train"]
    head = 151_936 // 2 * 2560 * 2
    assert moved["train"]["teacher"] == moved["rollout"]["teacher"] == pytest.approx(head, rel=0.01)
    assert plain["rollout"]["teacher"] == moved["score"]["teacher"], "the teacher's pass is worse"
    assert "weights" not in moved["score"]
    assert moved["train"]["optimizer"] == plain["rollout"]["optimizer"]


def test_gradients_leave_with_the_optimizer_and_the_student_alone_stays_for_scoring():
    moved = _planned(train=("param_offload",))
    assert moved["score"]["weights"] and moved["score"]["optimizer"]
    assert "weights" not in moved["rollout"] and moved["rollout"]["gradients"]
