"""Which layers a model gets on which machine, and what of it is fused.

Layer: one process that says it has a GPU while the configuration is made; models are built on CPU
with stand-ins for Transformer-Engine's modules (tests/helpers/transformer_engine.py).
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers

from megatron_sod.config.schema import ParallelConfig
from megatron_sod.errors import ConfigError
from megatron_sod.model import build
from megatron_sod.model.geometry import load_geometry
from megatron_sod.parallel import state
from tests.helpers.families import FAMILIES
from tests.helpers.tiny import write_model_with_weights
from tests.helpers.transformer_engine import transformer_engine_layers

EXTENSION = "fused_weight_gradient_mlp_cuda"


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A function that says what is installed beside the GPU."""
    find_spec = importlib.util.find_spec

    def installed(*packages: str) -> None:
        def find(name: str, package: str | None = None):
            if name in ("transformer_engine", EXTENSION):
                return "found" if name in packages else None
            return find_spec(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", find)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        # Megatron's own would look for a real Transformer-Engine.
        monkeypatch.setattr(build, "TransformerConfig", SimpleNamespace)

    return installed


@pytest.fixture
def geometry(tmp_path):
    write_model_with_weights(tmp_path, seed=1, **FAMILIES["qwen3_moe"])
    return load_geometry(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_16_bits_get_transformer_engine(on_a_gpu, geometry, dtype):
    """Its attention has no kernel for packed sequences in float32, the default dtype."""
    on_a_gpu("transformer_engine")
    config = build.transformer_config(geometry, ParallelConfig(), dtype=dtype)
    has_te = dtype == torch.bfloat16
    assert build.has_transformer_engine(dtype) == has_te
    assert config.apply_rope_fusion == config.moe_grouped_gemm == has_te
    assert config.gradient_accumulation_fusion == has_te


@pytest.mark.parametrize(
    ("packages", "dtype", "is_fused"),
    [
        ((), torch.bfloat16, False),
        (("transformer_engine",), torch.bfloat16, True),
        ((EXTENSION,), torch.bfloat16, True),
        ((EXTENSION,), torch.float32, True),
        (("transformer_engine",), torch.float32, False),
    ],
)
def test_weight_gradients_accumulate_in_the_product_with_either_package(
    on_a_gpu, geometry, packages, dtype, is_fused
):
    on_a_gpu(*packages)
    config = build.transformer_config(geometry, ParallelConfig(), dtype=dtype)
    assert config.gradient_accumulation_fusion == is_fused


def test_float64_is_refused_on_a_gpu(on_a_gpu, geometry):
    on_a_gpu("transformer_engine")
    with pytest.raises(ConfigError, match="float64"):
        build.build_model(geometry, ParallelConfig(), None, dtype="float64")


def test_a_fused_model_has_a_head_without_the_extension(geometry, monkeypatch):
    monkeypatch.setattr(build, "has_fused_gradient_accumulation", lambda dtype: True)
    assert not layers._grad_accum_fusion_available
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        state.initialize(ParallelConfig(), seed=0)
        with transformer_engine_layers():
            model = build.build_model(geometry, ParallelConfig(), state.process_groups())
        assert model.config.gradient_accumulation_fusion
        assert model.chunks[0].output_layer.weight is not None
        assert not layers._grad_accum_fusion_available
    finally:
        state.parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
