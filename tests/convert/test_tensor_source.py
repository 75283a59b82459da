"""Boxes read out of files, and conversions in blocks of a few rows.

Layer: files in a temporary folder, one process. Memory: tests/convert/test_memory.py; that Megatron
loads a checkpoint stored in blocks: tests/model/test_distributed_weights.py.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from safetensors.torch import load_file

from megatron_sod.config.schema import ParallelConfig
from megatron_sod.convert import tensor_source, to_megatron
from megatron_sod.convert.hf_files import HfTensors
from megatron_sod.convert.layout import segments_of
from megatron_sod.convert.megatron_files import MegatronSource, MegatronTensors
from megatron_sod.convert.tensor_source import fill_local, read_box, row_blocks
from megatron_sod.convert.to_hf import convert_megatron_to_hf
from megatron_sod.convert.to_megatron import convert_hf_to_megatron
from megatron_sod.errors import CheckpointError
from megatron_sod.model.geometry import load_geometry
from tests.helpers.families import FAMILIES
from tests.helpers.tiny import write_model_with_weights

TP2_PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
TP4 = ParallelConfig(tensor_model_parallel_size=4)


@pytest.fixture
def small_blocks(monkeypatch):
    """700 elements: 10 rows of 64, which divide no tensor into equal blocks; one row of 1024."""
    monkeypatch.setattr(tensor_source, "BLOCK_NUMEL", 700)


@pytest.mark.parametrize("shape", [(1,), (700,), (701,), (389, 64), (3, 1024), (1, 2)])
def test_row_blocks_cover_every_row_once(small_blocks, shape):
    blocks = list(row_blocks(shape))
    assert [row for first, length in blocks for row in range(first, first + length)] == list(
        range(shape[0])
    )
    row = math.prod(shape[1:])
    assert all(length == 1 or length * row <= 700 for _, length in blocks)


@pytest.mark.parametrize("shape", [(37,), (61, 23), (1, 61, 23), (3, 61, 23), (3, 2, 31, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_box_of_a_file_is_the_slice_of_the_tensor(tmp_path, small_blocks, shape, dtype):
    whole, rng = torch.randn(shape).to(dtype), random.Random(len(shape))
    path = tmp_path / "file"
    path.write_bytes(b"before" + whole.view(torch.uint8).numpy().tobytes() + b"after")
    for number in range(40):
        start = [rng.randrange(extent) for extent in shape]
        size = [rng.randint(1, extent - begin) for extent, begin in zip(shape, start, strict=True)]
        size[:-2] = [1] * len(size[:-2])
        if number % 3 == 0:
            start[-1], size[-1] = 0, shape[-1]  # whole rows
        slices = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        for box in _targets(size, dtype):
            read_box(box, path, len(b"before"), shape, dtype, start)
            assert torch.equal(box, whole[slices].to(box.dtype)), (start, size)


def _targets(size, dtype):
    """Contiguous, with gaps between rows and between numbers, and of another dtype."""
    yield torch.full(size, torch.nan, dtype=dtype)
    wide = torch.full((*size[:-1], size[-1] + 3), torch.nan, dtype=dtype)
    yield wide.narrow(-1, 2, size[-1])
    yield torch.full((*size[:-1], size[-1] * 2), torch.nan, dtype=dtype)[..., ::2]
    yield torch.full(size, torch.nan, dtype=torch.float64)


def test_a_file_that_shrank_while_it_was_read_is_named(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(40))
    with pytest.raises(CheckpointError, match="file: it ends 8 bytes early"):
        read_box(torch.empty(3, 4), path, 0, (3, 4), torch.float32, (0, 0))


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2", "llama"])
def test_conversion_in_small_blocks_is_bit_exact_through_three_layouts(
    tmp_path, monkeypatch, family
):
    monkeypatch.setattr(tensor_source, "BLOCK_NUMEL", 3000)  # 46 rows of 64
    source = write_model_with_weights(
        tmp_path / "hf0", seed=1, vocab_size=389, dtype=torch.bfloat16, **FAMILIES[family]
    )
    expected = load_file(source / "model.safetensors")
    for number, layout in enumerate([TP2_PP2, ParallelConfig(), TP4]):
        convert_hf_to_megatron(
            tmp_path / f"hf{number}",
            tmp_path / f"m{number}",
            parallel=layout,
            max_shard_bytes=99_999,
        )
        out = tmp_path / f"hf{number + 1}"
        convert_megatron_to_hf(tmp_path / f"m{number}", out, max_shard_bytes=99_999)
        found = {k: v for path in out.glob("*.safetensors") for k, v in load_file(path).items()}
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_a_rank_reads_its_slices_and_little_more(tmp_path, monkeypatch, kind, tp_size):
    """Both kinds of directory give a rank the same numbers; only columns cost their whole rows."""
    source = write_model_with_weights(tmp_path / "hf", seed=2, vocab_size=389, **FAMILIES["qwen3"])
    geometry = load_geometry(source)
    tensors = HfTensors(source)
    if kind == "megatron":
        convert_hf_to_megatron(source, tmp_path / "m")
        tensors = MegatronSource(MegatronTensors(tmp_path / "m"), geometry)
    whole = load_file(source / "model.safetensors")
    read: list[int] = []
    into = tensor_source._read_into
    monkeypatch.setattr(
        tensor_source, "_read_into", lambda t, file: (read.append(t.nbytes), into(t, file))
    )
    prefix, rows, columns = "decoder.layers.2.", geometry.padded_vocab_size(tp_size) // tp_size, 64
    for name, shape, factor in (
        ("embedding.word_embeddings.weight", (rows, columns), 1),
        (prefix + "self_attention.linear_qkv.weight", (16 * 32 // tp_size, columns), 1),
        (prefix + "mlp.linear_fc1.weight", (2 * 128 // tp_size, columns), 1),
        (prefix + "mlp.linear_fc2.weight", (64, 128 // tp_size), tp_size),
    ):
        for rank in range(tp_size):
            segments = segments_of(name, geometry, tp_rank=rank, tp_size=tp_size)
            target = torch.full(shape, torch.nan)
            read.clear()
            fill_local(target, (0, 0), segments, tensors)
            expected = torch.zeros(shape)
            for s in segments:
                part = whole[s.hf_name].narrow(s.dim, s.hf_start, s.length)
                expected.narrow(s.dim, s.local_start, s.length).copy_(part)
            assert torch.equal(target, expected)
            assert sum(read) <= target.nbytes * factor


def test_chunks_stored_column_by_column_are_read_too(tmp_path, monkeypatch):
    """Only other programs write such chunks; they are read whole."""
    source = write_model_with_weights(tmp_path / "hf", seed=2)
    assemble = to_megatron._assemble
    monkeypatch.setattr(to_megatron, "_assemble", lambda *box: assemble(*box).t().contiguous().t())
    report = convert_hf_to_megatron(source, tmp_path / "m")
    assert report.values["num_identical"] == report.values["num_tensors"]
    stored = MegatronSource(MegatronTensors(tmp_path / "m"), load_geometry(source))
    stored.rows("model.embed_tokens.weight", 3, 5)
    assert list(stored._tensors._places.values()) == [None]
