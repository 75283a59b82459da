"""What the converters refuse: one clear error each, and nothing is left behind.

Layer: files in a temporary folder, one process.
"""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sod.config.schema import ParallelConfig
from megatron_sod.convert import output
from megatron_sod.convert.megatron_files import MegatronTensors
from megatron_sod.convert.to_hf import convert_megatron_to_hf
from megatron_sod.convert.to_megatron import convert_hf_to_megatron
from megatron_sod.errors import CheckpointError, ConfigError, ModelError
from tests.helpers.families import FAMILIES
from tests.helpers.tiny import write_model_with_weights

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """hf/ in three shards or more, m/ converted from it."""
    folder = tmp_path_factory.mktemp("refusals")
    source = write_model_with_weights(folder / "source", seed=5)
    convert_hf_to_megatron(source, folder / "m")
    convert_megatron_to_hf(folder / "m", folder / "hf", max_shard_bytes=120_000)
    return folder


@pytest.fixture
def hf(made, tmp_path):
    return shutil.copytree(made / "hf", tmp_path / "hf")


@pytest.fixture
def checkpoint(made, tmp_path):
    return shutil.copytree(made / "m", tmp_path / "m")


def _refuses(source, tmp_path, kind, *words, convert=convert_hf_to_megatron, **options):
    out = tmp_path / "out"
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(kind) as caught:
        convert(source, out, **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before  # neither out nor out.partial
    return str(caught.value)


def _edit(path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_missing_shard_is_named(hf, tmp_path):
    second = sorted(hf.glob("*.safetensors"))[1]
    second.unlink()
    _refuses(hf, tmp_path, ModelError, str(hf), second.name, "is not there", "download or copy")


@pytest.mark.parametrize("cut", [40, 1])
def test_truncated_safetensors_are_named(hf, tmp_path, cut):
    path = sorted(hf.glob("*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:-cut])
    _refuses(hf, tmp_path, ModelError, path.name, "not a complete safetensors file", "copy it")


@pytest.mark.parametrize("content", [b"", b"\x07", b"\x10" + b"\0" * 7 + b"not json at all!"])
def test_a_file_that_is_no_safetensors_is_named(hf, tmp_path, content):
    path = sorted(hf.glob("*.safetensors"))[0]
    path.write_bytes(content)
    _refuses(hf, tmp_path, ModelError, path.name, "not a complete safetensors file")


def test_an_unknown_architecture_is_refused_with_the_supported_ones(hf, tmp_path):
    _edit(hf / "config.json", lambda c: c.update(architectures=["GPT2LMHeadModel"]))
    _refuses(hf, tmp_path, ModelError, "GPT2LMHeadModel", "Qwen3ForCausalLM", "layout.py")


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3_moe", "qwen3_untied"])
def test_weights_of_another_architecture_are_refused(hf, tmp_path, family):
    _edit(hf / "config.json", lambda c: c.update(FAMILIES[family], num_hidden_layers=2,
          num_attention_heads=4, num_key_value_heads=2, head_dim=32))  # fmt: skip
    _refuses(hf, tmp_path, ModelError, str(hf))


def test_weights_of_another_size_are_refused(hf, tmp_path):
    _edit(hf / "config.json", lambda c: c.update(intermediate_size=160))
    _refuses(hf, tmp_path, ModelError, "gate_proj", "(128, 64)", "(160, 64)", "different models")


def test_fewer_layers_than_tensors_are_refused(hf, tmp_path):
    _edit(hf / "config.json", lambda c: c.update(num_hidden_layers=1))
    _refuses(hf, tmp_path, ModelError, "tensors a qwen3 model does not have", "layers.1.")


def test_a_head_that_should_be_tied_and_is_not_is_refused(tmp_path):
    source = write_model_with_weights(tmp_path / "source", seed=5)
    tensors = load_file(source / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[3, 4] += 1e-3
    save_file({**tensors, "lm_head.weight": head}, source / "model.safetensors")
    _refuses(source, tmp_path, ModelError, "lm_head.weight", "holds other numbers")


def test_mixed_dtypes_under_one_stored_name_need_a_choice(tmp_path):
    source = write_model_with_weights(tmp_path / "source", seed=5)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name].bfloat16()}, source / "model.safetensors")
    _refuses(source, tmp_path, ModelError, "linear_fc2", "bfloat16", "float32", "--dtype")
    report = convert_hf_to_megatron(source, tmp_path / "out", dtype=torch.float32)
    assert report.values["dtypes"] == {"float32": len(tensors)}


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"tensor_model_parallel_size": 3}, ["tensor_model_parallel_size 3", "heads 4"]),
        ({"pipeline_model_parallel_size": 4}, ["pipeline_model_parallel_size 4", "layers 2"]),
        ({"expert_model_parallel_size": 2}, ["expert_model_parallel_size 2", "no experts"]),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(hf, tmp_path, layout, words):
    _refuses(hf, tmp_path, ConfigError, *words, parallel=ParallelConfig(**layout))


@pytest.mark.parametrize("kind", ["directory", "file"])
@pytest.mark.parametrize("direction", ["to_megatron", "to_hf"])
def test_an_existing_result_is_never_overwritten(hf, checkpoint, tmp_path, kind, direction):
    out = tmp_path / "out"
    if kind == "directory":
        out.mkdir()
        (out / "keep.txt").write_text("mine")
    else:
        out.write_text("mine")
    convert, source = {
        "to_megatron": (convert_hf_to_megatron, hf),
        "to_hf": (convert_megatron_to_hf, checkpoint),
    }[direction]
    _refuses(source, tmp_path, CheckpointError, "is not an empty directory", convert=convert)
    assert (out / "keep.txt" if kind == "directory" else out).read_text() == "mine"


def test_an_empty_result_directory_is_used(hf, tmp_path):
    (tmp_path / "out").mkdir()
    convert_hf_to_megatron(hf, tmp_path / "out")
    assert (tmp_path / "out/.metadata").is_file()


@pytest.mark.parametrize("direction", ["to_megatron", "to_hf"])
def test_too_little_disk_space_is_found_before_writing(
    hf, checkpoint, tmp_path, monkeypatch, direction
):
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1, 64 << 20))
    convert, source = {
        "to_megatron": (convert_hf_to_megatron, hf),
        "to_hf": (convert_megatron_to_hf, checkpoint),
    }[direction]
    _refuses(source, tmp_path, CheckpointError, "needs 0.07 GB", "0.07 GB free", "make room",
             convert=convert)  # fmt: skip


def test_a_directory_that_is_no_checkpoint_is_refused(hf, tmp_path):
    _refuses(hf, tmp_path, CheckpointError, "not a Megatron distributed checkpoint", "iter_*",
             convert=convert_megatron_to_hf)  # fmt: skip


def test_a_checkpoint_without_configuration_is_refused(checkpoint, tmp_path):
    (checkpoint / "config.json").unlink()
    _refuses(checkpoint, tmp_path, CheckpointError, "no config.json", "another program",
             convert=convert_megatron_to_hf)  # fmt: skip


def test_a_checkpoint_of_another_backend_is_refused(checkpoint, tmp_path):
    _edit(checkpoint / "metadata.json", lambda c: c.update(sharded_backend="zarr"))
    _refuses(checkpoint, tmp_path, CheckpointError, "'zarr'", "torch_dist",
             convert=convert_megatron_to_hf)  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x04."])
def test_an_unreadable_index_is_refused(checkpoint, tmp_path, content):
    (checkpoint / ".metadata").write_bytes(content)
    _refuses(checkpoint, tmp_path, CheckpointError, "index cannot be read",
             convert=convert_megatron_to_hf)  # fmt: skip


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_damaged_checkpoint_file_is_named(checkpoint, tmp_path, damage):
    path = checkpoint / "__0_0.distcp"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-5000])
    _refuses(checkpoint, tmp_path, CheckpointError, path.name, "copy it again",
             convert=convert_megatron_to_hf)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"intermediate_size": 160}, "(2, 320, 64)"),
        ({"vocab_size": 600}, "(600, 64)"),
        ({"tie_word_embeddings": False}, "no tensor output_layer.weight"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "no tensor"),
        (
            {"architectures": ["LlamaForCausalLM"]},
            "holds decoder.layers.self_attention.q_layernorm",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(checkpoint, tmp_path, change, word):
    _edit(checkpoint / "config.json", lambda c: c.update(change))
    _refuses(checkpoint, tmp_path, CheckpointError, str(checkpoint), word,
             convert=convert_megatron_to_hf)  # fmt: skip


def test_numbers_that_change_on_the_way_are_found(hf, tmp_path, monkeypatch):
    """The comparison reads the result again: one flipped bit in it must be seen."""
    fill = MegatronTensors.fill

    def with_a_flipped_bit(self, target, name, geometry, start):
        fill(self, target, name, geometry, start)
        if name == "decoder.layers.1.mlp.linear_fc2.weight":
            target.view(torch.uint8)[5, 7] ^= 1

    monkeypatch.setattr(MegatronTensors, "fill", with_a_flipped_bit)
    _refuses(hf, tmp_path, CheckpointError, "differ in 1 of", "model.layers.1.mlp.down_proj.weight")


@pytest.mark.parametrize("text", ["", "5 parsecs", "0GB", "-1GB", "GB"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="expected a number and a unit"):
        output.num_bytes(text)


def test_sizes_are_read_with_their_units():
    assert output.num_bytes("5GB") == 5 * 10**9 and output.num_bytes("1.5 MiB") == 3 << 19
    assert output.num_bytes("200mb") == 2 * 10**8 and output.num_bytes("17") == 17
