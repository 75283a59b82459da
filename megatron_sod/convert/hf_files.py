"""Reading and writing model directories in Hugging Face format, block by block."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from megatron_sod.convert.tensor_source import TensorSource, read_box
from megatron_sod.errors import ModelError

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
MAX_SHARD_BYTES = 5 * 10**9
_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Contents = Mapping[str, tuple[torch.dtype, Sequence[int]]]


class HfTensors(TensorSource):
    """The tensors of a model directory; of each only the box asked for is read.

    Raises:
        ModelError: no safetensors there, a shard of the index is missing, or a file is cut short.
    """

    def __init__(self, model_dir: str | Path):
        self.directory = Path(model_dir)
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise ModelError(
                f"model directory {model_dir}: no *.safetensors there; convert the weights to "
                "safetensors (transformers: model.save_pretrained) first"
            )
        _check_index(self.directory)
        self._entries: dict[str, _Entry] = {}
        for path in files:
            self._entries |= _entries(path)

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        stored = self._entry(name).dtype
        if stored not in _DTYPES:
            raise ModelError(
                f"{self.directory}: tensor {name} is stored as {stored}; supported are "
                f"{', '.join(_DTYPES)}"
            )
        return _DTYPES[stored]

    def fill(self, target: torch.Tensor, name: str, start: Sequence[int]) -> None:
        entry = self._entry(name)
        read_box(target, entry.path, entry.offset, entry.shape, self.dtype(name), start)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ModelError(
                f"{self.directory}: tensor {name!r} is missing; the directory does not hold the "
                "architecture its config.json names"
            )
        return self._entries[name]


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: its bytes begin at `offset` of the file."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


def _check_index(directory: Path) -> None:
    path = directory / _INDEX
    if not path.is_file():
        return
    named = set(json.loads(path.read_text())["weight_map"].values())
    if missing := sorted(name for name in named if not (directory / name).is_file()):
        raise ModelError(
            f"{directory}: {_INDEX} names {len(named)} shards and {', '.join(missing)} is not "
            "there; download or copy the missing files"
        )


def _entries(path: Path) -> dict[str, _Entry]:
    """The tensors of a safetensors file, which must be complete."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length + 8 > size:
            raise _broken(path, f"{size} bytes, and its header alone is {length}")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise _broken(path, f"its header is not JSON: {error}") from error
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected:
        raise _broken(path, f"{size} bytes, its header describes {expected}")
    return {
        name: _Entry(
            path, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"])
        )
        for name, entry in header.items()
    }


def _broken(path: Path, reason: str) -> ModelError:
    return ModelError(f"{path}: not a complete safetensors file ({reason}); copy it again")


def write_hf_directory(
    out_dir: str | Path,
    contents: Contents,
    blocks: Iterable[tuple[str, torch.Tensor]],
    side_files_from: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write safetensors shards, a block in memory at a time, and copy config and tokenizer.

    Args:
        contents: {HF tensor: (dtype, shape)} in the order of `blocks`.
        blocks: (HF tensor, some rows of it), that is each tensor's rows in one block or several.
    The index is written when there are several shards.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    shards = _shards(contents, max_shard_bytes)
    written = [out / f"shard-{number}.safetensors.partial" for number in range(len(shards))]
    stream = iter(blocks)
    for path, shard in zip(written, shards, strict=True):
        with path.open("wb") as file:
            file.write(_header(shard))
            for name, (dtype, shape) in shard.items():
                _write_tensor(file, name, dtype, shape, stream)
    assert next(stream, None) is None, "more blocks than the contents describe"
    _rename_shards(out, written, shards)
    copy_side_files(side_files_from, out)


def _shards(contents: Contents, max_shard_bytes: int) -> list[dict]:
    """The contents of each file; a tensor larger than a shard has one of its own."""
    shards: list[dict] = [{}]
    room = max_shard_bytes
    for name, (dtype, shape) in contents.items():
        size = _num_bytes(dtype, shape)
        if shards[-1] and size > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = (dtype, shape)
        room -= size
    return shards


def _header(shard: Contents) -> bytes:
    """The beginning of a safetensors file: 8 bytes of length, then JSON, up to a multiple of 8."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in shard.items():
        begin, end = end, end + _num_bytes(dtype, shape)
        assert begin % dtype.itemsize == 0, f"{name} would not lie on a multiple of its item size"
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(
    file: BinaryIO,
    name: str,
    dtype: torch.dtype,
    shape: Sequence[int],
    stream: Iterator[tuple[str, torch.Tensor]],
) -> None:
    missing = _num_bytes(dtype, shape)
    while missing > 0:
        found, block = next(stream)
        assert (found, block.dtype) == (name, dtype), f"{found} {block.dtype}, not {name} {dtype}"
        file.write(block.contiguous().view(torch.uint8).numpy().data)
        missing -= block.nbytes
        del block  # before the next is made
    assert missing == 0, f"{name} has {-missing} bytes more than {list(shape)} of {dtype}"


def _num_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return math.prod(shape) * dtype.itemsize


def _rename_shards(out: Path, written: list[Path], shards: list[dict]) -> None:
    for stale in [*out.glob("*.safetensors"), out / _INDEX]:
        stale.unlink(missing_ok=True)  # a stale index would name shards that are gone
    if len(written) == 1:
        written[0].rename(out / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(written):05d}.safetensors" for i in range(len(written))]
    for path, name in zip(written, names, strict=True):
        path.rename(out / name)
    total = sum(_num_bytes(*entry) for shard in shards for entry in shard.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {t: name for name, shard in zip(names, shards, strict=True) for t in shard},
    }
    (out / _INDEX).write_text(json.dumps(index, indent=2))


def copy_side_files(source: str | Path, out: str | Path) -> None:
    """Configuration, tokenizer, generation config and chat template travel with the weights."""
    for name in SIDE_FILES:
        path, target = Path(source) / name, Path(out) / name
        if path.is_file() and path.resolve() != target.resolve():
            shutil.copyfile(path, target)
