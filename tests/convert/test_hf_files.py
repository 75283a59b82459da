"""Model directories on disk: shards, index, side files, and what is missing.

Layer: pure, with files in a temporary folder. Which tensors there are:
tests/convert/test_layout.py; that transformers loads the result: tests/model/test_build.py.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sod.convert.hf_files import HfTensors, write_hf_directory
from megatron_sod.errors import ModelError


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        "a.weight": torch.randn(7, 5),  # 140 bytes
        "b.weight": torch.randn(3, 11),  # 132
        "norm.weight": torch.randn(9),  # 36
        "c.weight": torch.randn(2, 2, dtype=torch.float32).bfloat16(),  # 8
    }


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text(f"contents of {name}")
    (folder / "unrelated.bin").write_text("x")
    return folder


def _write(out, source, *, max_shard_bytes=1 << 20, tensors=None):
    tensors = _tensors() if tensors is None else tensors
    contents = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_hf_directory(out, contents, tensors.items(), source, max_shard_bytes=max_shard_bytes)


def _files(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _same(folder, expected):
    found = HfTensors(folder)
    assert sorted(found.names()) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(found.rows(name, 0, tensor.size(0)), tensor)
        assert found.shape(name) == tuple(tensor.shape)


def test_a_small_model_is_one_file_with_its_side_files(tmp_path, source):
    out = tmp_path / "out"
    _write(out, source)
    assert _files(out) == [
        "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert (out / "config.json").read_text() == "contents of config.json"
    _same(out, _tensors())


def test_a_large_model_is_sharded_with_an_index_over_every_tensor(tmp_path, source):
    out = tmp_path / "out"
    _write(out, source, max_shard_bytes=150)
    # 140 | 132 (+ 36 would be 168) | 36 + 8
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["weight_map"] == {
        "a.weight": names[0], "b.weight": names[1], "norm.weight": names[2], "c.weight": names[2],
    }  # fmt: skip
    assert index["metadata"]["total_size"] == 140 + 132 + 36 + 8
    for name, file in index["weight_map"].items():
        assert name in load_file(out / file)
    _same(out, _tensors())


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path, source):
    _write(tmp_path / "out", source, max_shard_bytes=1)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4
    _same(tmp_path / "out", _tensors())


@pytest.mark.parametrize("sizes", [(150, 1 << 20), (1 << 20, 150), (1, 150)])
def test_writing_again_leaves_nothing_of_the_first_model(tmp_path, source, sizes):
    out = tmp_path / "out"
    _write(out, source, max_shard_bytes=sizes[0])
    second = {name: tensor + 1 for name, tensor in _tensors().items()}
    _write(out, source, max_shard_bytes=sizes[1], tensors=second)
    _same(out, second)
    has_index = (out / "model.safetensors.index.json").exists()
    assert has_index == (sizes[1] == 150)  # a stale index would name files that are gone
    assert not list(out.glob("*.partial"))


def test_a_view_is_written_as_its_own_values(tmp_path, source):
    base = torch.arange(24.0).reshape(4, 6)
    views = {"columns": base[:, 1:3], "rows": base[2:], "transposed": base.t()}
    _write(tmp_path / "out", source, tensors=views)
    _same(tmp_path / "out", {name: view.clone() for name, view in views.items()})


def test_a_model_may_be_written_over_the_directory_its_side_files_come_from(source):
    _write(source, source)
    assert (source / "tokenizer.json").read_text() == "contents of tokenizer.json"
    _same(source, _tensors())


def test_blocks_of_rows_end_up_as_whole_tensors_that_safetensors_reads(tmp_path, source):
    tensors = _tensors()
    contents = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    blocks = [(name, row[None]) for name, tensor in tensors.items() for row in tensor]
    write_hf_directory(tmp_path / "out", contents, blocks, source, max_shard_bytes=150)
    found = {
        k: v for p in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(p).items()
    }
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("wrong", ["order", "dtype", "too many", "too large"])
def test_blocks_that_are_not_what_the_contents_say_are_never_written(tmp_path, source, wrong):
    tensors = _tensors()
    contents = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    blocks = list(tensors.items())
    if wrong == "order":
        blocks.reverse()
    elif wrong == "dtype":
        blocks[0] = ("a.weight", blocks[0][1].bfloat16())
    elif wrong == "too many":
        blocks.append(blocks[0])
    else:
        blocks[0] = ("a.weight", torch.zeros(8, 5))
    with pytest.raises(AssertionError):
        write_hf_directory(tmp_path / "out", contents, blocks, source)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_missing_tensor_is_named_with_its_directory(tmp_path, source):
    _write(tmp_path / "out", source)
    tensors = HfTensors(tmp_path / "out")
    for ask in (lambda: tensors.shape("gone"), lambda: tensors.rows("gone", 0, 1)):
        with pytest.raises(ModelError, match="tensor 'gone' is missing") as caught:
            ask()
        assert str(tmp_path / "out") in str(caught.value)


def test_a_directory_without_weights_is_refused(source):
    with pytest.raises(ModelError, match="no \\*.safetensors there"):
        HfTensors(source)


def test_a_broken_file_is_named(tmp_path):
    save_file(_tensors(), tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-40])
    with pytest.raises(ModelError, match="model.safetensors.*not a complete safetensors file"):
        HfTensors(tmp_path)
