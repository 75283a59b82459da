"""Reading and writing model directories in Hugging Face format, tensor by tensor."""

from __future__ import annotations

import json
import shutil
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
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 * 1024**3


class HfTensors:
    """Lazy access to the tensors of a model directory; slices are read without the rest."""

    def __init__(self, model_dir: str | Path):
        self.directory = Path(model_dir)
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise ModelError(
                f"model directory {model_dir}: no *.safetensors there; convert the weights to "
                "safetensors (transformers: model.save_pretrained) first"
            )
        self._handles = [_open(path) for path in files]
        self._file_of = {name: handle for handle in self._handles for name in handle.keys()}

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, dim: int, start: int, length: int) -> torch.Tensor:
        """Indices [start, start + length) along `dim`."""
        view = self._slice(name)
        return view[start : start + length] if dim == 0 else view[:, start : start + length]

    def _slice(self, name: str):
        if name not in self._file_of:
            raise ModelError(
                f"{self.directory}: tensor {name!r} is missing; the directory does not hold the "
                "architecture its config.json names"
            )
        return self._file_of[name].get_slice(name)


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ModelError(f"{path}: not a complete safetensors file ({error}); copy it again") from (
            error
        )


def write_hf_directory(
    out_dir: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    side_files_from: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write safetensors shards (never more than one in memory) and copy config and tokenizer.

    `tensors` yields every HF tensor once. The index is written when there are several shards.
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
        pending[name] = tensor.contiguous().clone()
        weight_map[name] = len(written)
        pending_bytes += size
        total_bytes += size
    flush()
    _rename_shards(out, written, weight_map, total_bytes)
    copy_side_files(side_files_from, out)


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


def copy_side_files(source: str | Path, out: Path) -> None:
    """Configuration, tokenizer, generation config and chat template travel with the weights."""
    for name in SIDE_FILES:
        path = Path(source) / name
        if path.is_file() and path.resolve() != (out / name).resolve():
            shutil.copyfile(path, out / name)
