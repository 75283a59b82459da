"""Checkpoints: what is loaded is what was saved, and the next step is the same step.

Layers: gloo ranks with the real optimizer and dist_checkpointing. Killing and resuming a whole
run: tests/end_to_end.
"""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch

from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny import write_model_with_weights

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = write_model_with_weights(folder / "model", seed=6)
    return run_on_ranks(2, _save_and_continue, str(model), str(folder / "checkpoints"))[0]


def test_weights_after_the_next_step_are_bit_equal_to_an_undisturbed_run(outcome):
    undisturbed, resumed = outcome["undisturbed"], outcome["resumed"]
    assert undisturbed.keys() == resumed.keys()
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    assert any(not torch.equal(undisturbed[n], outcome["at_save"][n]) for n in undisturbed)


def test_progress_and_retention(outcome):
    assert outcome["progress"] == (2, 2, 32, 2)
    assert outcome["kept"] == ["iter_000001", "iter_000002", "latest"]


def test_parameters_changed_right_after_a_save_are_not_in_it(outcome):
    """The writing thread works from copies: on CPU, staged tensors would be the live ones."""
    assert outcome["was_writing"], "the change came after the write: the test says nothing"
    assert all(
        torch.equal(outcome["at_save"][n], outcome["reloaded"][n]) for n in outcome["at_save"]
    )


def test_random_generators_continue_where_they_stood(outcome):
    assert outcome["drawn_resumed"] == outcome["drawn"]


def test_a_folder_that_is_no_checkpoint_is_refused_by_name(outcome):
    assert "not a complete checkpoint" in outcome["refused"]


def _save_and_continue(model_dir: str, folder: str) -> dict:
    from pathlib import Path

    from megatron_sod.errors import CheckpointError
    from megatron_sod.train import async_save
    from megatron_sod.train.checkpoint import Checkpoints, Progress

    gate = _hold_writers(async_save)
    trainable, loss_fn, batches = _trainable(model_dir)
    checkpoints = Checkpoints(folder, keep_last=2)
    for iteration in range(3):
        trainable.step(batches[iteration : iteration + 1], loss_fn)
        if iteration < 2:
            done = iteration + 1
            at_save = _weights(trainable)
            checkpoints.save(trainable, Progress(done, done, 16 * done, done, "hash"))
            drawn = _draw()
            was_writing = checkpoints.is_writing
        else:
            gate.set()
            checkpoints.finish()
    undisturbed = _weights(trainable)
    trainable, loss_fn, batches = _trainable(model_dir, initialise=False)
    progress = checkpoints.load(trainable, checkpoints.latest())
    reloaded, drawn_resumed = _weights(trainable), _draw()
    trainable.step(batches[2:3], loss_fn)
    try:
        checkpoints.load(trainable, model_dir)
        refused = ""
    except CheckpointError as error:
        refused = str(error)
    return {
        "undisturbed": undisturbed,
        "resumed": _weights(trainable),
        "at_save": at_save,
        "was_writing": was_writing,
        "reloaded": reloaded,
        "drawn": drawn,
        "drawn_resumed": drawn_resumed,
        "progress": (
            progress.iteration,
            progress.policy_version,
            progress.num_prompts_drawn,
            progress.num_optimizer_steps,
        ),
        "kept": sorted(path.name for path in Path(folder).iterdir()),
        "refused": refused,
    }


def _hold_writers(async_save) -> threading.Event:
    """The second save's files are written only once the returned event is set."""
    gate, write, calls = threading.Event(), async_save._Job.write, []

    def held(job):
        calls.append(job)
        if len(calls) > 1:
            assert gate.wait(60)
        return write(job)

    async_save._Job.write = held
    return gate


def _weights(trainable) -> dict[str, torch.Tensor]:
    from megatron_sod.model.weights import gather_hf_tensors

    tensors = gather_hf_tensors(trainable.model, trainable.geometry)
    return {name: tensor.clone() for name, tensor in tensors}


def _draw() -> list[float]:
    """From every generator a checkpoint holds; advances them."""
    from megatron.core import tensor_parallel

    with tensor_parallel.get_cuda_rng_tracker().fork():
        megatron = float(torch.rand(1))
    return [float(torch.rand(1)), random.random(), float(np.random.rand()), megatron]


def _trainable(model_dir: str, *, initialise: bool = True):
    from megatron_sod.config.schema import ParallelConfig, TrainConfig
    from megatron_sod.data.packing import PackItem, pack
    from megatron_sod.model.build import build_model
    from megatron_sod.model.geometry import load_geometry
    from megatron_sod.model.weights import load_hf_weights
    from megatron_sod.parallel import state
    from megatron_sod.train.sft import _loss_fn
    from megatron_sod.train.trainable import Trainable

    parallel = ParallelConfig(tensor_model_parallel_size=2)
    if initialise:
        state.initialize(parallel, seed=0)
    geometry = load_geometry(model_dir)
    model = build_model(geometry, parallel, state.process_groups())
    load_hf_weights(model, geometry, model_dir)
    trainable = Trainable(model, geometry, TrainConfig(num_iterations=3, lr=1e-2))
    generator = torch.Generator().manual_seed(9)
    batches = []
    for _ in range(3):
        ids = torch.randint(0, geometry.vocab_size, (12,), generator=generator).tolist()
        batches.append(pack([PackItem(ids, [True] * 12, [1] * 12, [0.0] * 12, 0)]))
    return trainable, _loss_fn(model, state.process_groups().tp), batches
