"""Megatron models from HF directories, every family in every layout that four ranks can hold.

Logits equal transformers', every tensor comes back bit-equal, and weights survive resharding.
Layers: gloo ranks; transformers is the oracle. Gradients under parallelism: tests/train.
"""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_sod.config.schema import ParallelConfig
from megatron_sod.data.packing import PackItem, alignment_of, pack
from megatron_sod.model.build import build_model
from megatron_sod.model.geometry import load_geometry
from megatron_sod.model.weights import export_hf, gather_hf_tensors, load_hf_weights
from megatron_sod.parallel import state
from megatron_sod.parallel.context import whole_rows
from megatron_sod.train.schedule import forward_only
from tests.helpers.families import FAMILIES
from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny import write_model_with_weights

pytestmark = pytest.mark.dist

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
TP4 = {"tensor_model_parallel_size": 4}
EP2 = {"expert_model_parallel_size": 2}
SP = {"sequence_parallel": True}
DENSE = {
    "tp1": {},
    "tp2": TP2,
    "tp2_sp": {**TP2, **SP},
    "pp2": PP2,
    "tp2_pp2": {**TP2, **PP2},
    "pp2_two_chunks": {**PP2, "virtual_pipeline_model_parallel_size": 2},
    "cp2": CP2,
    "tp2_sp_cp2": {**TP2, **SP, **CP2},
    "pp2_cp2": {**PP2, **CP2},
}
EXPERTS = {
    "ep2": EP2,
    "ep2_whole_experts": {**TP2, **SP, **EP2, "expert_tensor_parallel_size": 1},
    "tp2_sp_ep2": {**TP2, **SP, **EP2},
    "pp2_ep2": {**PP2, **EP2},
    "cp2_ep2": {**CP2, **EP2},
}
LAYOUTS = {**DENSE, **EXPERTS}
CASES = [(name, layout) for layout in DENSE for name in FAMILIES]
CASES += [("qwen3_moe", layout) for layout in EXPERTS]
RESHARDED = ["tp2_pp2", "tp1", "tp4"]
SEQUENCES = [[5, 17, 300, 183, 9, 0, 44, 21, 8, 250, 99], [8, 1], [200, 201, 7, 13]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    for number, (name, config) in enumerate(FAMILIES.items()):
        # 401 rows are no multiple of anything: ranks hold padding
        odd = {"vocab_size": 401} if not config.get("tie_word_embeddings", True) else {}
        write_model_with_weights(folder / name, seed=number, **{**config, **odd})
    return folder


@pytest.fixture(scope="module")
def measured(models):
    """Rank 0's {(model, layout): logits and whether its tensors came back}, and the resharding."""
    return run_on_ranks(4, _measure, str(models), CASES)[0]


@pytest.fixture(scope="module")
def expected(models):
    from transformers import AutoModelForCausalLM

    logits = {}
    for name in FAMILIES:
        reference = AutoModelForCausalLM.from_pretrained(models / name)
        with torch.no_grad():
            parts = [reference(torch.tensor([ids])).logits[0, :-1] for ids in SEQUENCES]
        logits[name] = torch.cat(parts)
    return logits


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_logits_equal_transformers_in_every_layout(measured, expected, name, layout):
    logits = measured[name, layout]["logits"]
    assert logits.shape == expected[name].shape
    assert float(expected[name].abs().max()) > 0.5, "logits too small for the bound to mean much"
    assert float((logits - expected[name]).abs().max()) <= 1e-5


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_hf_round_trip_is_bit_exact(measured, name, layout):
    assert measured[name, layout]["changed_tensors"] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_survive_resharding_bit_by_bit(measured, models, name):
    assert measured["resharded"] == RESHARDED
    before = load_file(models / name / "model.safetensors")
    after = load_file(models / f"{name}_{RESHARDED[-1]}" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[tensor], after[tensor]) for tensor in before)


def _measure(folder: str, cases: list) -> dict:
    results: dict = {}
    for layout, section in LAYOUTS.items():
        with _layout(section) as (parallel, groups):
            for name in [n for n, wanted in cases if wanted == layout]:
                results[name, layout] = _one(f"{folder}/{name}", parallel, groups)
    for number, layout in enumerate(RESHARDED):
        with _layout(LAYOUTS.get(layout, TP4)) as (parallel, groups):
            for name in FAMILIES:
                source = f"{folder}/{name}" + (f"_{RESHARDED[number - 1]}" if number else "")
                model, geometry = _load(source, parallel, groups)
                export_hf(model, geometry, f"{folder}/{name}_{layout}", source)
    return {**results, "resharded": RESHARDED}


@contextlib.contextmanager
def _layout(section: dict):
    parallel = ParallelConfig(**section)
    state.initialize(parallel, seed=0)
    yield parallel, state.process_groups()
    state.release_groups()


def _load(model_dir: str, parallel: ParallelConfig, groups):
    geometry = load_geometry(model_dir)
    model = build_model(geometry, parallel, groups)
    load_hf_weights(model, geometry, model_dir)
    return model, geometry


def _one(model_dir: str, parallel: ParallelConfig, groups) -> dict:
    model, geometry = _load(model_dir, parallel, groups)
    items = [
        PackItem(ids, [True] * len(ids), ids, [0.0] * len(ids), number)
        for number, ids in enumerate(SEQUENCES)
    ]
    batch = pack(items, alignment_of(model.config))
    model.eval()
    logits = forward_only(model, [batch], partial(_all_logits, model, len(batch.rows)))
    offers: list = [None] * dist.get_world_size()
    dist.all_gather_object(offers, logits[0][:, : geometry.vocab_size] if logits else None)
    original = load_file(f"{model_dir}/model.safetensors")
    changed = [
        name
        for name, tensor in gather_hf_tensors(model, geometry)
        if not torch.equal(tensor, original[name])
    ]
    return {
        "logits": next(offer for offer in offers if offer is not None),
        "changed_tensors": changed,
    }


def _all_logits(model, num_rows: int, hidden, batch, _number):
    """[rows, padded vocabulary] of the whole micro-batch."""
    groups = model.pg_collection
    shard = model.output_logits(hidden, batch.rows)
    parts = [torch.empty_like(shard) for _ in range(groups.tp.size())]
    dist.all_gather(parts, shard.contiguous(), group=groups.tp)
    return whole_rows(torch.cat(parts, dim=-1), batch.places, num_rows, groups.cp)
