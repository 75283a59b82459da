"""A checkpoint written at TP2 x PP2 is the same model and optimizer in every other layout.

Layers: 4 gloo ranks with the real distributed optimizer. Saving and resuming in one layout:
test_checkpoint.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny import write_model_with_weights

TP2_PP2 = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
LAYOUTS = {  # of 4 ranks; the rest is data-parallel
    "same": TP2_PP2,
    "tp1": {},
    "pp2": dict(pipeline_model_parallel_size=2),
    "tp4": dict(tensor_model_parallel_size=4),
}
VOCAB = 381  # padded to 512 with TP 2 and 4, to 384 with TP 1
pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    model = write_model_with_weights(
        folder / "model", seed=3, vocab_size=VOCAB, num_key_value_heads=4
    )
    return run_on_ranks(4, _all_layouts, str(model), str(folder))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_loaded_is_what_was_saved_bit_for_bit(outcome, layout):
    saved, loaded = outcome["saved"], outcome[layout]["loaded"]
    assert saved.keys() == loaded.keys() and any("exp_avg_sq" in name for name in saved)
    for name, tensor in saved.items():
        assert torch.equal(tensor, loaded[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_next_iteration_has_the_same_loss_and_optimizer_state(outcome, layout):
    undisturbed, found = outcome["undisturbed"], outcome[layout]
    assert found["loss"] == pytest.approx(undisturbed["loss"], rel=2e-6)
    assert found["step_counts"] == undisturbed["step_counts"] == {3.0}
    for name, tensor in undisturbed["tensors"].items():
        # float32 sums in another order; a moment's scale is that of its largest element
        scale = float(tensor.abs().max())
        error = float((tensor - found["tensors"][name]).abs().max())
        assert error <= 1e-4 * scale, f"{name}: {error} of {scale}"
        if layout == "same":
            assert error == 0.0, name


def test_the_comparison_would_notice_a_step_from_fresh_moments(outcome):
    """exp_avg after one more step differs from the saved one by far more than the tolerance."""
    saved, after = outcome["saved"], outcome["undisturbed"]["tensors"]
    name = next(n for n in saved if "exp_avg." in n)
    assert float((saved[name] - after[name]).abs().max()) > 1e-2 * float(saved[name].abs().max())


def _all_layouts(model_dir: str, folder: str) -> dict:
    from megatron_sod.train.checkpoint import Checkpoints

    def checkpoints(name: str) -> Checkpoints:
        return Checkpoints(f"{folder}/{name}", keep_last=3)

    trainable, step = _trainable(model_dir, TP2_PP2)
    for number in range(2):
        step(number)
    first = checkpoints("first")
    results: dict = {"saved": _save(first, trainable, VOCAB)}
    loss = step(2)
    results["undisturbed"] = _after(checkpoints("undisturbed"), trainable, loss)
    for name, layout in LAYOUTS.items():
        _leave()
        trainable, step = _trainable(model_dir, layout)
        own = checkpoints(name)
        own.load(trainable, first.latest())
        loaded = _save(own, trainable, VOCAB)
        loss = step(2)
        results[name] = {"loaded": loaded, **_after(own, trainable, loss)}
    return results


def _after(checkpoints, trainable, loss: float) -> dict:
    parts = getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer])
    counts = {float(s["step"]) for part in parts for s in part.optimizer.state.values()}
    tensors = _save(checkpoints, trainable, VOCAB, iteration=2)
    return {
        "loss": loss,
        "tensors": tensors,
        "step_counts": counts,
    }


def _save(checkpoints, trainable, vocab: int, iteration: int = 1) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint of the present state, whole, without padded vocabulary rows."""
    from megatron.core import dist_checkpointing

    from megatron_sod.train.checkpoint import Progress

    checkpoints.save(trainable, Progress(iteration, 0, 0, 0, ""))
    checkpoints.finish()
    tensors = dict(_flat(dist_checkpointing.load_plain_tensors(str(checkpoints.latest()))))
    return {
        name: tensor[:vocab].clone() if "embedding" in name or "output_layer" in name else tensor
        for name, tensor in tensors.items()
    }


def _flat(values: dict, prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, torch.Tensor):
            yield prefix + str(key), value
        elif isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")


def _leave() -> None:
    from megatron_sod.parallel import state

    state.parallel_state.destroy_model_parallel()


def _trainable(model_dir: str, layout: dict):
    """A trainable model in the layout, and a step on the numbered batch of four sequences."""
    import torch.distributed as dist

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
    groups = state.process_groups()
    geometry = load_geometry(model_dir)
    model = build_model(geometry, parallel, groups)
    load_hf_weights(model, geometry, model_dir)
    trainable = Trainable(model, geometry, TrainConfig(num_iterations=3, lr=1e-2))
    loss_fn = _loss_fn(model, groups.tp)

    def step(number: int) -> float:
        generator = torch.Generator().manual_seed(number)
        batches = []
        for index in range(4):
            ids = torch.randint(0, VOCAB, (9,), generator=generator).tolist()
            if index % groups.dp.size() == groups.dp.rank():
                batches.append(pack([PackItem(ids, [True] * 9, [1] * 9, [0.0] * 9, 0)]))
        result = trainable.step(batches, loss_fn)
        sums = torch.zeros(2, dtype=torch.float64)
        for loss, count in result.collected:
            sums += torch.stack([loss.double(), count.double()])
        for group in (groups.dp, groups.pp):
            dist.all_reduce(sums, group=group)
        return float(sums[0] / sums[1])

    return trainable, step
