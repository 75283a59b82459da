"""A checkpoint of Transformer-Engine's layers loads with local layers, and the other way round.

Layer: 2 gloo ranks. Transformer-Engine is not installed: its innermost modules are stand-ins with
its names (tests/helpers/transformer_engine.py) in Megatron's own specs. Layouts:
test_checkpoint_layouts.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.helpers.checkpoints import VOCAB, saved_tensors
from tests.helpers.families import FAMILIES
from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny import write_model_with_weights

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]
# (family, layout that saves, layout that loads)
CASES = {
    "dense": ("qwen3", {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}),
    "experts": ("qwen3_moe", {"expert_model_parallel_size": 2}, {}),
}
WAYS = [("engine", "local"), ("local", "engine")]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    for family, _, _ in CASES.values():
        write_model_with_weights(folder / family, seed=4, **_config(family))
    return run_on_ranks(2, _save_and_load, str(folder))[0]


@pytest.mark.parametrize("way", WAYS, ids=" to ".join)
@pytest.mark.parametrize("case", CASES)
def test_weights_and_moments_are_the_same_bits(outcome, case, way):
    saved, loaded = outcome[case, way]
    assert saved.keys() == loaded.keys()
    assert sum("exp_avg_sq" in name for name in saved) == sum("exp_avg." in name for name in saved)
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


@pytest.mark.parametrize("case", CASES)
def test_both_write_the_same_names(outcome, case):
    by_engine, by_local = (outcome[case, way][0] for way in WAYS)
    assert {name: t.shape for name, t in by_engine.items()} == {
        name: t.shape for name, t in by_local.items()
    }
    assert any(name.endswith("layer_norm_weight") for name in by_local)


def _config(family: str) -> dict:
    return {**FAMILIES[family], "vocab_size": VOCAB}


def _save_and_load(folder: str) -> dict:
    results = {}
    for case, (family, source, target) in CASES.items():
        for way in WAYS:
            run = f"{folder}/{case}_{way[0]}"
            saved, path = _changed(f"{folder}/{family}", source, way[0], run)
            loaded = _loaded(f"{folder}/{family}", target, way[1], path, f"{run}_again")
            results[case, way] = (saved, loaded)
    return results


def _changed(model_dir: str, layout: dict, layers: str, folder: str):
    """The tensors of a checkpoint after a step with random gradients, and its folder."""
    from megatron_sod.parallel import state
    from megatron_sod.train.checkpoint import Checkpoints

    trainable = _trainable(model_dir, layout, layers)
    generator = torch.Generator().manual_seed(7)
    for chunk in trainable.ddp_chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            buffer.grad_data.normal_(generator=generator)
    trainable.optimizer.step()
    checkpoints = Checkpoints(folder, keep_last=1)
    saved = saved_tensors(checkpoints, trainable)
    path = checkpoints.latest()
    state.release_groups()
    return saved, path


def _loaded(model_dir: str, layout: dict, layers: str, path, folder: str):
    from megatron_sod.parallel import state
    from megatron_sod.train.checkpoint import Checkpoints

    trainable = _trainable(model_dir, layout, layers)
    for parameter in trainable.model.parameters():
        parameter.data.fill_(float("nan"))
    checkpoints = Checkpoints(folder, keep_last=1)
    checkpoints.load(trainable, path)
    loaded = saved_tensors(checkpoints, trainable)
    state.release_groups()
    return loaded


def _trainable(model_dir: str, layout: dict, layers: str):
    from megatron_sod.config.schema import ParallelConfig, TrainConfig
    from megatron_sod.model.build import build_model
    from megatron_sod.model.geometry import load_geometry
    from megatron_sod.model.weights import load_hf_weights
    from megatron_sod.parallel import state
    from megatron_sod.train.trainable import Trainable
    from tests.helpers.transformer_engine import transformer_engine_layers

    parallel = ParallelConfig(**layout)
    state.initialize(parallel, seed=0)
    geometry = load_geometry(model_dir)
    with transformer_engine_layers() if layers == "engine" else contextlib.nullcontext():
        model = build_model(geometry, parallel, state.process_groups())
    load_hf_weights(model, geometry, model_dir)
    return Trainable(model, geometry, TrainConfig(num_iterations=1, lr=1e-2))
