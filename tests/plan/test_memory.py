"""Planned bytes against the tensors a real Trainable allocates, at TP2, PP2 and DP2.

Layers: counting on paper, then Megatron on gloo ranks with a tiny model. What the numbers of the
shipped configurations are is left to test_shipped_plans.
"""

import pytest
import torch

from megatron_sod.config.schema import ParallelConfig, SodConfig
from megatron_sod.data.tiny_models import write_tiny_model
from megatron_sod.plan.geometries import shipped_geometry
from megatron_sod.plan.job import PlannedModel, job_of
from megatron_sod.plan.memory import activation_bytes, logit_bytes, training_state
from megatron_sod.plan.parameters import rank_parameters, total_parameters
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
