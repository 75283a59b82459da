"""Megatron models from HF directories: logits equal transformers', export is bit-exact.

Layers: gloo ranks; transformers is the oracle. Gradients under parallelism: tests/train.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny import write_model_with_weights

pytestmark = pytest.mark.dist

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    1: {"tp1": {}},
    2: {"tp2": TP2, "tp2_sp": {**TP2, "sequence_parallel": True}, "pp2": PP2},
    4: {"tp2_pp2": {**TP2, **PP2}},
}
SEQUENCES = [[5, 17, 300, 383, 9, 0, 44], [8], [200, 201, 7]]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def measured(request, tmp_path_factory):
    """(model directory, {layout: (logprobs, exported directory)})."""
    folder = tmp_path_factory.mktemp("build")
    model = write_model_with_weights(folder / "model", seed=4, tie_word_embeddings=request.param)
    results = {}
    for ranks, layouts in LAYOUTS.items():
        results |= run_on_ranks(ranks, _logits_and_export, str(model), layouts, str(folder))[-1]
    return model, results


@pytest.mark.parametrize("layout", ["tp1", "tp2", "tp2_sp", "pp2", "tp2_pp2"])
def test_logits_equal_transformers_in_every_layout(measured, layout):
    from transformers import AutoModelForCausalLM

    model_dir, results = measured
    reference = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        expected = torch.cat([reference(torch.tensor([ids])).logits[0] for ids in SEQUENCES])
    assert results[layout].shape == expected.shape
    assert float((results[layout] - expected).abs().max()) <= 1e-5


@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp2", "tp2_pp2"])
def test_hf_round_trip_is_bit_exact(measured, layout):
    model_dir, _ = measured
    before = load_file(model_dir / "model.safetensors")
    after = load_file(model_dir.parent / layout / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def _all_logits(model, hidden, _batch, _number):
    return model.output_logits(hidden, torch.arange(sum(len(ids) for ids in SEQUENCES)))


def _logits_and_export(model_dir: str, layouts: dict, out: str) -> dict:
    from megatron_sod.config.schema import ParallelConfig
    from megatron_sod.data.packing import PackItem, pack
    from megatron_sod.model.build import build_model
    from megatron_sod.model.geometry import load_geometry
    from megatron_sod.model.weights import export_hf, load_hf_weights
    from megatron_sod.parallel import state
    from megatron_sod.train.schedule import forward_only

    geometry = load_geometry(model_dir)
    items = [PackItem(ids, [False] * len(ids), ids, [], 0) for ids in SEQUENCES]
    results = {}
    for name, section in layouts.items():
        parallel = ParallelConfig(**section)
        state.initialize(parallel, seed=0)
        groups = state.process_groups()
        model = build_model(geometry, parallel, groups)
        load_hf_weights(model, geometry, model_dir)
        export_hf(model, geometry, f"{out}/{name}", model_dir)
        batch = pack(items, multiple_of=4)
        shards = forward_only(model, [batch], partial(_all_logits, model))
        if shards:
            parts = [torch.empty_like(shards[0]) for _ in range(groups.tp.size())]
            dist.all_gather(parts, shards[0].contiguous(), group=groups.tp)
            results[name] = torch.cat(parts, dim=-1)[:, : geometry.vocab_size]
        state.parallel_state.destroy_model_parallel()
    return results
