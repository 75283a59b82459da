"""A run goes on with another kind of Adam: torch's on CPU, a fused one on GPUs.

Layer: two gloo ranks, one start for all cases. The fused one is a stand-in that keeps its state
where Transformer-Engine's does (tests/helpers/fused_adam.py). Other layers: test_checkpoint_layers.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch

from tests.helpers.families import FAMILIES
from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny import write_model_with_weights

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]
EP2 = {"expert_model_parallel_size": 2}
# (family, dtype, distributed optimizer, layout)
MODES = {
    "distributed": ("qwen3", "float32", True, {}),
    "whole": ("qwen3", "float32", False, {}),
    "whole, bfloat16": ("qwen3", "bfloat16", False, {}),
    "distributed, experts": ("qwen3_moe", "bfloat16", True, EP2),
}
KINDS = ("torch", "fused")
CHANGED_DECAY = 0.25


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimizers")
    for family in {mode[0] for mode in MODES.values()}:
        settings = {**FAMILIES[family], "vocab_size": 381}
        write_model_with_weights(folder / family, seed=4, **settings)
    return run_on_ranks(2, _save_and_go_on, str(folder))


@pytest.mark.parametrize("loaded_by", KINDS)
@pytest.mark.parametrize("saved_by", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_the_run_goes_on_as_if_it_had_not_stopped(outcome, mode, saved_by, loaded_by):
    """One more step; a step count that started again would take a larger one."""
    for rank in outcome:
        expected, resumed = rank[mode, saved_by], rank[mode, saved_by, loaded_by]
        tolerance = {"atol": 5e-4, "rtol": 1e-2} if "bfloat16" in MODES[mode] else {"atol": 2e-6}
        for name, weight in expected.items():
            assert torch.allclose(resumed[name], weight, **tolerance), name


@pytest.mark.parametrize("loaded_by", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_settings_are_those_of_the_present_configuration(outcome, mode, loaded_by):
    for rank in outcome:
        assert rank[mode, "torch", loaded_by, "decay"] == [CHANGED_DECAY]


def test_generators_return_on_the_same_kind_of_device_only(outcome):
    """Those of a CPU are no states for a GPU's."""
    for rank in outcome:
        assert rank["generators return"] == {"cpu": True, "cuda": False}


def _save_and_go_on(folder: str) -> dict:
    results: dict = {"generators return": _generators_after(folder)}
    for mode in MODES:
        for saved_by in KINDS:
            path = f"{folder}/{mode}_{saved_by}"
            results[mode, saved_by] = _saved(folder, mode, saved_by, path)
            for loaded_by in KINDS:
                found, decay = _resumed(folder, mode, loaded_by, path)
                results[mode, saved_by, loaded_by] = found
                results[mode, saved_by, loaded_by, "decay"] = decay
    return results


def _saved(folder: str, mode: str, kind: str, path: str) -> dict[str, torch.Tensor]:
    """The weights one step after a checkpoint that was written after three."""
    from megatron_sod.train.checkpoint import Checkpoints, Progress

    with _opened(folder, mode, kind) as trainable:
        for number in range(3):
            _step(trainable, number)
        checkpoints = Checkpoints(path, keep_last=1)
        checkpoints.save(trainable, Progress(1, 0, 0, 0, ""))
        checkpoints.finish()
        _step(trainable, 3)
        return _weights(trainable)


def _resumed(folder: str, mode: str, kind: str, path: str):
    from megatron_sod.train.checkpoint import Checkpoints

    with _opened(folder, mode, kind, weight_decay=CHANGED_DECAY) as trainable:
        checkpoints = Checkpoints(path, keep_last=1)
        checkpoints.load(trainable, checkpoints.latest())
        groups = trainable.optimizer.param_groups
        decay = sorted({group["weight_decay"] for group in groups})
        for group in groups:
            group["weight_decay"] = 0.0  # as before the checkpoint
        _step(trainable, 3)
        return _weights(trainable), decay


def _generators_after(folder: str) -> dict[str, bool]:
    """By the device that wrote the checkpoint: whether loading it here set the generators."""
    from megatron_sod.train import checkpoint

    found = {}
    with _opened(folder, "whole", "torch") as trainable:
        _step(trainable, 0)
        for kind in ("cpu", "cuda"):
            checkpoints = checkpoint.Checkpoints(f"{folder}/on_{kind}", keep_last=1)
            with mock.patch.object(checkpoint, "device", lambda kind=kind: torch.device(kind)):
                checkpoints.save(trainable, checkpoint.Progress(1, 0, 0, 0, ""))
            checkpoints.finish()
            torch.manual_seed(12345)
            before = torch.get_rng_state()
            checkpoints.load(trainable, checkpoints.latest())
            found[kind] = not torch.equal(torch.get_rng_state(), before)
    return found


@contextlib.contextmanager
def _opened(folder: str, mode: str, kind: str, weight_decay: float = 0.0):
    from megatron_sod.config.schema import ParallelConfig, TrainConfig
    from megatron_sod.model.build import build_model
    from megatron_sod.model.geometry import load_geometry
    from megatron_sod.model.weights import load_hf_weights
    from megatron_sod.parallel import state
    from megatron_sod.train.trainable import Trainable
    from tests.helpers.fused_adam import fused_adam

    family, dtype, distributed, layout = MODES[mode]
    parallel, geometry = ParallelConfig(**layout), load_geometry(f"{folder}/{family}")
    state.initialize(parallel, seed=0)
    train = TrainConfig(
        num_iterations=1,
        lr=1e-2,
        weight_decay=weight_decay,
        use_distributed_optimizer=distributed,
    )
    with fused_adam() if kind == "fused" else contextlib.nullcontext():
        model = build_model(geometry, parallel, state.process_groups(), dtype=dtype)
        load_hf_weights(model, geometry, f"{folder}/{family}")
        yield Trainable(model, geometry, train)
    state.release_groups()


def _step(trainable, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for chunk in trainable.ddp_chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            buffer.grad_data.normal_(generator=generator)
    assert trainable.optimizer.step()[0]


def _weights(trainable) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainable.model.named_parameters()}
