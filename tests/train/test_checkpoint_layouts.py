"""A checkpoint of one layout is the same model and optimizer in every other.

Layers: gloo ranks with the real distributed optimizer; three moves on 2 ranks, the rest, on 4, are
slow. Saving and resuming in one layout: test_checkpoint. Other kinds of layers:
test_checkpoint_layers.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers.checkpoints import VOCAB, saved_tensors
from tests.helpers.families import FAMILIES
from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny import write_model_with_weights

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
TP4, SP = {"tensor_model_parallel_size": 4}, {"sequence_parallel": True}
CP2 = {"context_parallel_size": 2}
EP2, EP4 = {"expert_model_parallel_size": 2}, {"expert_model_parallel_size": 4}
CHUNKS = {**PP2, "virtual_pipeline_model_parallel_size": 2}
WHOLE_EXPERTS = {"expert_tensor_parallel_size": 1}
# name: (ranks, family, layout that saves, layouts that load); what a layout leaves is data-parallel
MOVES = {
    "two chunks to tp": (2, "qwen3", CHUNKS, {"tp2": TP2}),
    "cp to dp": (2, "qwen3", CP2, {"dp2": {}}),
    "ep to dp": (2, "qwen3_moe", EP2, {"dp2": {}}),
    "from tp2 pp2": (
        4,
        "qwen3",
        {**TP2, **PP2},
        {
            "same": {**TP2, **PP2},
            "dp4": {},
            "pp2": PP2,
            "tp4": TP4,
            "cp2 two chunks": {**CP2, **CHUNKS},
        },
    ),
    "from two chunks": (
        4,
        "qwen3",
        CHUNKS,
        {"same": CHUNKS, "pp2": PP2, "tp2 cp2": {**TP2, **SP, **CP2}},
    ),
    "from cp2 tp2": (
        4,
        "qwen3_untied",
        {**CP2, **TP2, **SP},
        {"same": {**CP2, **TP2, **SP}, "dp4": {}, "pp2": PP2},
    ),
    "from ep2": (
        4,
        "qwen3_moe",
        EP2,
        {
            "same": EP2,
            "dp4": {},
            "ep4": EP4,
            "ep2 pp2": {**EP2, **PP2},
            "tp2 sp ep2 whole experts": {**TP2, **SP, **EP2, **WHOLE_EXPERTS},
        },
    ),
    "from ep2 two chunks": (
        4,
        "qwen3_moe",
        {**EP2, **CHUNKS},
        {"same": {**EP2, **CHUNKS}, "tp2 sp": {**TP2, **SP}, "ep4": EP4, "cp2": CP2},
    ),
}
pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if ranks > 2 else [])
        for name, (ranks, *_) in MOVES.items()
    ],
)
def outcome(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    ranks, family, source, targets = MOVES[request.param]
    model = write_model_with_weights(folder / "model", seed=3, vocab_size=VOCAB, **FAMILIES[family])
    return run_on_ranks(ranks, _move, str(model), str(folder), source, targets)[0]


def test_what_is_loaded_is_what_was_saved_bit_for_bit(outcome):
    saved = outcome["saved"]
    assert any("exp_avg_sq" in name for name in saved)
    for layout, found in outcome["targets"].items():
        assert saved.keys() == found["loaded"].keys()
        for name, tensor in saved.items():
            assert torch.equal(tensor, found["loaded"][name]), (layout, name)


def test_next_iteration_has_the_same_loss_and_optimizer_state(outcome):
    undisturbed = outcome["undisturbed"]
    assert undisturbed["step_counts"] == {3.0}
    for layout, found in outcome["targets"].items():
        assert found["loss"] == pytest.approx(undisturbed["loss"], rel=2e-6), layout
        assert found["step_counts"] == {3.0}
        for name, tensor in undisturbed["tensors"].items():
            # float32 sums in another order; a moment's scale is that of its largest element
            scale = float(tensor.abs().max())
            error = float((tensor - found["tensors"][name]).abs().max())
            assert error <= 1e-4 * scale, f"{layout}, {name}: {error} of {scale}"
            if layout == "same":
                assert error == 0.0, name


def test_the_comparison_would_notice_a_step_from_fresh_moments(outcome):
    """exp_avg after one more step differs from the saved one by far more than the tolerance."""
    saved, after = outcome["saved"], outcome["undisturbed"]["tensors"]
    name = next(n for n in saved if "exp_avg." in n)
    assert float((saved[name] - after[name]).abs().max()) > 1e-2 * float(saved[name].abs().max())


def _move(model_dir: str, folder: str, source: dict, targets: dict[str, dict]) -> dict:
    from megatron_sod.parallel import state
    from megatron_sod.train.checkpoint import Checkpoints

    def checkpoints(name: str) -> Checkpoints:
        return Checkpoints(f"{folder}/{name}", keep_last=3)

    trainable, step = _trainable(model_dir, source)
    for number in range(2):
        step(number)
    first = checkpoints("first")
    saved = saved_tensors(first, trainable)
    loss = step(2)
    results: dict = {"saved": saved, "targets": {}}
    results["undisturbed"] = _after(checkpoints("undisturbed"), trainable, loss)
    for name, layout in targets.items():
        state.release_groups()
        trainable, step = _trainable(model_dir, layout)
        own = checkpoints(name)
        own.load(trainable, first.latest())
        loaded = saved_tensors(own, trainable)
        loss = step(2)
        results["targets"][name] = {"loaded": loaded, **_after(own, trainable, loss)}
    return results


def _after(checkpoints, trainable, loss: float) -> dict:
    parts = getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer])
    counts = {float(s["step"]) for part in parts for s in part.optimizer.state.values()}
    tensors = saved_tensors(checkpoints, trainable, iteration=2)
    return {
        "loss": loss,
        "tensors": tensors,
        "step_counts": counts,
    }


def _trainable(model_dir: str, layout: dict):
    """A trainable model in the layout, and a step on the numbered batch of four sequences."""
    import torch.distributed as dist

    from megatron_sod.config.schema import ParallelConfig, TrainConfig
    from megatron_sod.data.packing import PackItem, alignment_of, pack
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
                item = PackItem(ids, [True] * 9, [1] * 9, [0.0] * 9, 0)
                batches.append(pack([item], alignment_of(parallel)))
        result = trainable.step(batches, loss_fn)
        sums = torch.zeros(2, dtype=torch.float64)
        for loss, count in result.collected:
            sums += torch.stack([loss.double(), count.double()])
        for group in (groups.dp_cp, groups.pp):
            dist.all_reduce(sums, group=group)
        return float(sums[0] / sums[1])

    return trainable, step
