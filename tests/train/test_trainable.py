"""A gradient that is no finite number leaves weights and optimizer as they were, on every rank.

Layer: two gloo ranks, one start for all layouts. That the iteration counts such steps and goes on:
test_methods.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from tests.helpers.families import FAMILIES
from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny import write_model_with_weights

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]
EP2 = {"expert_model_parallel_size": 2}
# (family, dtype, distributed optimizer, layout, value, before or after the gradients' reduction)
CASES = {
    "dp2": ("qwen3", "float32", False, {}, math.nan, "before"),
    "dp2, one replica alone": ("qwen3", "float32", False, {}, math.nan, "after"),
    "dp2, distributed": ("qwen3", "float32", True, {}, math.inf, "before"),
    "tp2": ("qwen3", "bfloat16", False, {"tensor_model_parallel_size": 2}, math.nan, "before"),
    "pp2": ("qwen3", "bfloat16", True, {"pipeline_model_parallel_size": 2}, -math.inf, "before"),
    "ep2": ("qwen3_moe", "float32", False, EP2, math.nan, "before"),
    "ep2, distributed": ("qwen3_moe", "bfloat16", True, EP2, math.nan, "before"),
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    for family in {case[0] for case in CASES.values()}:
        settings = {**FAMILIES[family], "vocab_size": 381}
        write_model_with_weights(folder / family, seed=4, **settings)
    return run_on_ranks(2, _steps_of_all, str(folder))


@pytest.mark.parametrize("case", CASES)
def test_a_non_finite_gradient_of_one_rank_changes_nothing_anywhere(outcome, case):
    for rank in outcome:
        before, skipped, after, _, _ = rank[case]
        assert not skipped.is_applied
        assert before.keys() == after.keys()
        assert sum("exp_avg" in name for name in before) > 0
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not math.isfinite(rank[case][1].grad_norm) for rank in outcome)


@pytest.mark.parametrize("case", CASES)
def test_the_step_after_it_is_applied(outcome, case):
    for rank in outcome:
        _, _, after, applied, end = rank[case]
        assert applied.is_applied and 0 < applied.grad_norm < math.inf
        assert all(torch.isfinite(tensor).all() for tensor in end.values())
        assert any(not torch.equal(after[name], end[name]) for name in after)


@pytest.mark.parametrize("case", CASES)
def test_an_ordinary_step_is_bit_equal_to_megatrons_own(outcome, case):
    for rank in outcome:
        before, *_ = rank[case]
        by_megatron = rank[f"{case}, by Megatron"]
        assert before.keys() == by_megatron.keys()
        assert all(torch.equal(before[name], by_megatron[name]) for name in before)


def _steps_of_all(folder: str) -> dict:
    results = {}
    for name, (family, dtype, distributed, layout, value, when) in CASES.items():
        trainable, step = _opened(f"{folder}/{family}", dtype, distributed, layout)
        assert step().is_applied
        before = _snapshot(trainable)
        whole = trainable.model.config.finalize_model_grads_func
        trainable.model.config.finalize_model_grads_func = _poisoned(trainable, value, when)
        skipped, after = step(), _snapshot(trainable)
        trainable.model.config.finalize_model_grads_func = whole
        results[name] = (before, skipped, after, step(), _snapshot(trainable))
        _release()
        trainable, step = _opened(f"{folder}/{family}", dtype, distributed, layout, plain=True)
        assert step()[0]
        results[f"{name}, by Megatron"] = _snapshot(trainable)
        _release()
    return results


def _release() -> None:
    from megatron_sod.parallel import state

    state.release_groups()


def _opened(model_dir: str, dtype: str, distributed: bool, layout: dict, plain: bool = False):
    """A student and a function that takes a step with it; `plain`, with Megatron's own."""
    from megatron_sod.config.schema import ParallelConfig, TrainConfig
    from megatron_sod.data.packing import PackItem, pack
    from megatron_sod.model.build import build_model
    from megatron_sod.model.geometry import load_geometry
    from megatron_sod.model.weights import load_hf_weights
    from megatron_sod.parallel import state
    from megatron_sod.train.sft import _loss_fn
    from megatron_sod.train.trainable import Trainable

    parallel = ParallelConfig(**layout)
    state.initialize(parallel, seed=0)
    geometry = load_geometry(model_dir)
    model = build_model(geometry, parallel, state.process_groups(), dtype=dtype)
    load_hf_weights(model, geometry, model_dir)
    train = TrainConfig(num_iterations=1, lr=1e-2, use_distributed_optimizer=distributed)
    trainable = Trainable(model, geometry, train)
    batch = pack([PackItem([5, 17, 300, 380], [True] * 4, [1] * 4, [0.0] * 4, 0)])
    loss_fn = _loss_fn(model, state.process_groups().tp)

    def step():
        if not plain:
            return trainable.step([batch], loss_fn)
        trainable.accumulate([batch], loss_fn)
        return trainable.optimizer.step()

    return trainable, step


def _poisoned(trainable, value: float, when: str):
    """Megatron's reduction of gradients; one value is written on the last rank before or after."""
    finalize = trainable.model.config.finalize_model_grads_func

    def write() -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            name = "linear_fc2"
            found = [p for n, p in trainable.model.named_parameters() if name in n]
            found[-1].main_grad.view(-1)[3] = value

    def poisoned(*args, **options):
        if when == "before":
            write()
        finalize(*args, **options)
        if when == "after":
            write()

    return poisoned


def _snapshot(trainable) -> dict[str, torch.Tensor]:
    """Weights and every tensor of the optimizer, copied."""
    found = {name: p.detach().clone() for name, p in trainable.model.named_parameters()}
    for number, part in enumerate(trainable.optimizer.chained_optimizers):
        if part.optimizer is None:
            continue
        for place, state in enumerate(part.optimizer.state.values()):
            for name, tensor in state.items():
                found[f"{number}.{place}.{name}"] = tensor.clone()
    return found
