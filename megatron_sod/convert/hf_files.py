"""Reading and writing model directories in Hugging Face format, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

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
_OPEN_FILES = 2  # a layer may lie across two shards; more would keep more of them in memory
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}


class HfTensors:
    """Lazy access to the tensors of a model directory; slices are read without the rest.

    Files are memory-mapped, at most two at a time.

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
        self._entries: dict[str, tuple[Path, dict]] = {}
        for path in files:
            self._entries |= {name: (path, entry) for name, entry in _header(path).items()}
        self._open: OrderedDict[Path, safe_open] = OrderedDict()

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        stored = self._entry(name)["dtype"]
        if stored not in _DTYPES:
            raise ModelError(
                f"{self.directory}: tensor {name} is stored as {stored}; supported are "
                f"{', '.join(_DTYPES)}"
            )
        return _DTYPES[stored]

    def read(self, name: str, dim: int, start: int, length: int) -> torch.Tensor:
        """Indices [start, start + length) along `dim`."""
        self._entry(name)
        view = self._handle(self._entries[name][0]).get_slice(name)
        return view[start : start + length] if dim == 0 else view[:, start : start + length]

    def whole(self, name: str) -> torch.Tensor:
        return self.read(name, 0, 0, self.shape(name)[0])

    def _entry(self, name: str) -> dict:
        if name not in self._entries:
            raise ModelError(
                f"{self.directory}: tensor {name!r} is missing; the directory does not hold the "
                "architecture its config.json names"
            )
        return self._entries[name][1]

    def _handle(self, path: Path) -> safe_open:
        if path not in self._open:
            while len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)
            try:
                self._open[path] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise _broken(path, str(error)) from error
        self._open.move_to_end(path)
        return self._open[path]


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


def _header(path: Path) -> dict[str, dict]:
    """{tensor: dtype, shape, data_offsets} of a safetensors file, which must be complete."""
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
    return header


def _broken(path: Path, reason: str) -> ModelError:
    return ModelError(f"{path}: not a complete safetensors file ({reason}); copy it again")


def write_hf_directory(
    out_dir: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    side_files_from: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write safetensors shards (never more than one in memory) and copy config and tokenizer.

    `tensors` yields every HF tensor once, and leaves it alone afterwards. The index is written when
    there are several shards.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, int] = {}
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total_bytes = 0
    written: list[Path] = []

    def flush() -> None:
        nonlocal pending, pending_bytes
        if pending:
            path = out / f"shard-{len(written)}.safetensors.partial"
            save_file(pending, path, metadata={"format": "pt"})
            written.append(path)
            pending, pending_bytes = {}, 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending_bytes + size > max_shard_bytes:
            flush()
        pending[name] = _own(tensor)
        weight_map[name] = len(written)
        pending_bytes += size
        total_bytes += size
    flush()
    _rename_shards(out, written, weight_map, total_bytes)
    copy_side_files(side_files_from, out)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy where it is a view: a view would keep the whole alive."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _rename_shards(out: Path, written: list[Path], weight_map: dict[str, int], total: int) -> None:
    for stale in [*out.glob("*.safetensors"), out / _INDEX]:
        stale.unlink(missing_ok=True)  # a stale index would name shards that are gone
    if len(written) == 1:
        written[0].rename(out / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(written):05d}.safetensors" for i in range(len(written))]
    for path, name in zip(written, names, strict=True):
        path.rename(out / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {tensor: names[shard] for tensor, shard in weight_map.items()},
    }
    (out / _INDEX).write_text(json.dumps(index, indent=2))


def copy_side_files(source: str | Path, out: str | Path) -> None:
    """Configuration, tokenizer, generation config and chat template travel with the weights."""
    for name in SIDE_FILES:
        path, target = Path(source) / name, Path(out) / name
        if path.is_file() and path.resolve() != target.resolve():
            shutil.copyfile(path, target)
