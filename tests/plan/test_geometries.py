"""Every file in configs/models describes the model it is named after.

Layer: pure. Layouts and names of the tensors are left to tests/convert.
"""

import json
import math
import os
from pathlib import Path

import pytest

from megatron_sod.config.schema import ModelConfig
from megatron_sod.convert.layout import hf_shapes
from megatron_sod.data.tiny_models import write_tiny_model
from megatron_sod.errors import ModelError
from megatron_sod.model.geometry import geometry_from_hf
from megatron_sod.plan.geometries import planned_geometry, shipped_geometry, shipped_names

# Parameters in billions as the model cards give them; tied heads counted once.
BILLIONS = {
    "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.72,
    "qwen3-4b": 4.02,
    "qwen3-8b": 8.19,
    "qwen3-14b": 14.77,
    "qwen3-32b": 32.76,
    "qwen3-30b-a3b": 30.53,
    "qwen3-235b-a22b": 235.1,
    "qwen2.5-0.5b-instruct": 0.494,
    "qwen2.5-1.5b-instruct": 1.54,
    "qwen2.5-3b-instruct": 3.09,
    "qwen2.5-7b-instruct": 7.62,
    "qwen2.5-14b-instruct": 14.77,
    "qwen2.5-32b-instruct": 32.76,
    "llama-3.2-1b-instruct": 1.236,
    "llama-3.2-3b-instruct": 3.21,
    "llama-3.1-8b-instruct": 8.03,
    "llama-3.3-70b-instruct": 70.55,
}


def test_every_shipped_geometry_is_counted_here():
    assert set(BILLIONS) == set(shipped_names())


@pytest.mark.parametrize("name", BILLIONS)
def test_parameter_count_is_the_published_one(name):
    count = sum(math.prod(shape) for shape in hf_shapes(shipped_geometry(name)).values())
    assert count / 1e9 == pytest.approx(BILLIONS[name], rel=0.005)


@pytest.mark.skipif("SOD_SHARED_DATA" not in os.environ, reason="SOD_SHARED_DATA is not set")
def test_shipped_geometries_equal_the_public_config_files():
    files = sorted((Path(os.environ["SOD_SHARED_DATA"]) / "configs_qwen3").glob("*.json"))
    assert files
    for file in files:
        name = file.name.split(".config")[0].removesuffix(".derived").lower()
        assert shipped_geometry(name) == geometry_from_hf(json.loads(file.read_text())), name


def test_a_missing_directory_is_planned_by_its_name():
    assert planned_geometry(ModelConfig(path="models/Qwen3-1.7B")).hidden_size == 2048


def test_the_geometry_key_names_what_the_directory_does_not():
    model = ModelConfig(path="runs/sft/hf", geometry="qwen3-0.6b")
    assert planned_geometry(model).hidden_size == 1024


def test_an_existing_directory_is_read(tmp_path):
    write_tiny_model(tmp_path / "Qwen3-8B", hidden_size=96)
    assert planned_geometry(ModelConfig(path=str(tmp_path / "Qwen3-8B"))).hidden_size == 96


def test_an_unknown_model_lists_what_can_be_planned():
    with pytest.raises(ModelError, match=r"models/Mystery.*no configs/models/mystery\.yaml.*qwen3"):
        planned_geometry(ModelConfig(path="models/Mystery"))
