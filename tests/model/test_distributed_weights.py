"""Converted checkpoints in real models, and a run's checkpoints converted.

Layers: four gloo ranks, once; then files. Conversion itself: tests/convert/test_conversion.py.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from megatron_sod.config.schema import ParallelConfig
from megatron_sod.convert import tensor_source
from megatron_sod.convert.to_hf import convert_megatron_to_hf
from megatron_sod.convert.to_megatron import convert_hf_to_megatron
from tests.helpers.families import FAMILIES
from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny import write_model_with_weights

pytestmark = pytest.mark.dist

TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
TP4 = {"tensor_model_parallel_size": 4}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
TP2_EP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True, **EP2}
NAMES = list(FAMILIES)
# (family, layout the checkpoint was cut for, layout it is loaded at)
LOADS = [(name, TP2_PP2, TP4) for name in NAMES if name != "qwen3_moe"]
LOADS += [("qwen3", {}, TP2_PP2), ("qwen3_moe", TP2_PP2, TP2_EP2), ("qwen3_moe", EP2, PP2 | EP2)]
# Where a run is trained and saved.
TRAINED_AT = {name: TP2_PP2 for name in NAMES} | {"qwen3_moe": PP2 | EP2}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """What rank 0 found, and the folder with one model and its checkpoints per family. Every other
    checkpoint is stored in blocks of 46 rows or fewer."""
    folder = tmp_path_factory.mktemp("distributed")
    for number, (name, cut, _) in enumerate(LOADS):
        source = folder / name
        if not source.exists():
            write_model_with_weights(source, seed=number, vocab_size=389, **FAMILIES[name])
        parallel = ParallelConfig(**cut)
        with pytest.MonkeyPatch.context() as patch:
            if number % 2:
                patch.setattr(tensor_source, "BLOCK_NUMEL", 3000)
            convert_hf_to_megatron(source, folder / f"converted{number}", parallel=parallel)
    return folder, run_on_ranks(4, _load_train_and_save, str(folder))[0]


@pytest.mark.parametrize("number", range(len(LOADS)), ids=str)
def test_a_converted_checkpoint_loads_bit_exactly_at_another_layout(outcome, number):
    folder, found = outcome
    source = load_file(folder / LOADS[number][0] / "model.safetensors")
    _same(found["loaded"][number], source)


@pytest.mark.parametrize("number", range(len(LOADS)), ids=str)
def test_megatrons_own_loader_reads_it_too(outcome, number):
    _, found = outcome
    assert found["by_megatron"][number] == "equal"


@pytest.mark.parametrize("name", NAMES)
def test_a_runs_checkpoint_converts_and_moves_on_to_tp1_and_tp4(outcome, tmp_path, name):
    folder, found = outcome
    start = load_file(folder / name / "model.safetensors")
    trained = found["trained"][name]
    assert any(not torch.equal(trained[key], start[key]) for key in start)
    convert_megatron_to_hf(folder / f"run_{name}/iter_000001", tmp_path / "hf")
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == (
        folder / name / "tokenizer.json"
    ).read_bytes()
    for step, layout in enumerate(({}, TP4)):
        _same(load_file(tmp_path / "hf/model.safetensors"), trained)
        parallel = ParallelConfig(**layout)
        convert_hf_to_megatron(tmp_path / "hf", tmp_path / f"m{step}", parallel=parallel)
        (tmp_path / "hf").rename(tmp_path / f"hf{step}")
        convert_megatron_to_hf(tmp_path / f"m{step}", tmp_path / "hf")
    _same(load_file(tmp_path / "hf/model.safetensors"), trained)


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def _load_train_and_save(folder: str) -> dict:
    from megatron_sod.model.weights import gather_hf_tensors

    found: dict = {"loaded": [], "by_megatron": [], "trained": {}}
    for number, (name, _, at) in enumerate(LOADS):
        with _model(f"{folder}/{name}", at, f"{folder}/converted{number}") as (model, geometry):
            found["loaded"].append({k: t.clone() for k, t in gather_hf_tensors(model, geometry)})
            found["by_megatron"].append(_by_megatron(model, f"{folder}/converted{number}"))
    for name in NAMES:
        with _model(f"{folder}/{name}", TRAINED_AT[name], f"{folder}/{name}") as (model, geometry):
            trained = _train_and_save(model, geometry, f"{folder}/run_{name}", f"{folder}/{name}")
            found["trained"][name] = trained
    return found


def _model(model_dir: str, layout: dict, weights: str):
    import contextlib

    from megatron_sod.model.build import build_model
    from megatron_sod.model.geometry import load_geometry
    from megatron_sod.model.weights import load_hf_weights
    from megatron_sod.parallel import state

    @contextlib.contextmanager
    def opened():
        parallel = ParallelConfig(**layout)
        state.initialize(parallel, seed=0)
        geometry = load_geometry(model_dir)
        model = build_model(geometry, parallel, state.process_groups())
        load_hf_weights(model, geometry, weights)
        yield model, geometry
        state.parallel_state.destroy_model_parallel()

    return opened()


def _by_megatron(model, checkpoint: str) -> str:
    """Load the same checkpoint with dist_checkpointing into fresh storage and compare."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    expected = {name: value.detach().clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    state = model.sharded_state_dict()
    _, weights = extract_matching_values(state, lambda value: isinstance(value, ShardedObject))
    model.load_sharded_state_dict(dist_checkpointing.load(weights, checkpoint))
    found = dict(model.named_parameters())
    same = all(torch.equal(found[name], value) for name, value in expected.items())
    return "equal" if same and expected else "different"


def _train_and_save(model, geometry, checkpoints: str, side_files_from: str) -> dict:
    from megatron_sod.config.schema import TrainConfig
    from megatron_sod.data.packing import PackItem, pack
    from megatron_sod.model.weights import gather_hf_tensors
    from megatron_sod.parallel import state
    from megatron_sod.train.checkpoint import Checkpoints, Description, Progress
    from megatron_sod.train.sft import _loss_fn
    from megatron_sod.train.trainable import Trainable

    trainable = Trainable(model, geometry, TrainConfig(num_iterations=1, lr=1e-2))
    batch = pack([PackItem([5, 17, 300, 380], [True] * 4, [1] * 4, [0.0] * 4, 0)])
    trainable.step([batch], _loss_fn(model, state.process_groups().tp))
    saved = Checkpoints(
        checkpoints, keep_last=1, description=Description(model_dir=side_files_from)
    )
    saved.save(trainable, Progress(1, 1, 1, 1, "hash"))
    saved.finish()
    return {k: t.clone() for k, t in gather_hf_tensors(trainable.model, geometry)}
