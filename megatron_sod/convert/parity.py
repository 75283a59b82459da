"""The report beside a conversion: that both directories hold the same numbers, and which."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_sod.convert.hf_files import HfTensors
from megatron_sod.convert.layout import hf_shapes
from megatron_sod.convert.megatron_files import MegatronSource
from megatron_sod.convert.tensor_source import row_blocks
from megatron_sod.errors import CheckpointError
from megatron_sod.model.geometry import Geometry

REPORT, TEXT = "parity.json", "parity.txt"


class Report:
    """What `parity.json` says; `write` also leaves it as a few lines of text."""

    def __init__(self, geometry: Geometry, tensors: dict[str, dict]):
        counts = Counter(entry["dtype"] for entry in tensors.values())
        numbers = [torch.Size(entry["shape"]).numel() for entry in tensors.values()]
        self.values: dict[str, Any] = {
            "family": geometry.family,
            "num_tensors": len(tensors),
            "num_identical": sum(entry["identical"] for entry in tensors.values()),
            "num_parameters": sum(numbers),
            "dtypes": dict(counts),
            "tied_embeddings": geometry.tied_embeddings,
            "checksum": "first 64 bits of SHA-256 over the tensor's bytes in row-major order",
            "logits": None,
            "tensors": tensors,
        }

    def describe(self, title: str, source: Any, result: Any, left_out: list[str]) -> None:
        """Say what was converted, and which tensors repeat others and were left out."""
        start = {"conversion": title, "source": str(source), "result": str(result)}
        self.values = start | {"left_out": left_out} | self.values

    def write(self, folder: str | Path) -> None:
        (Path(folder) / REPORT).write_text(json.dumps(self.values, indent=1) + "\n")
        (Path(folder) / TEXT).write_text(self.text() + "\n")

    def text(self) -> str:
        v = self.values
        lines = [
            f"{v['conversion']}: {v['family']}, {v['num_parameters']:,} parameters in "
            f"{v['num_tensors']} tensors ({', '.join(f'{n} {t}' for t, n in v['dtypes'].items())})",
            f"{v['num_identical']} of {v['num_tensors']} tensors are equal bit by bit after "
            "reading the result again",
        ]
        if v["left_out"]:
            lines.append(f"left out, equal to the embedding: {', '.join(v['left_out'])}")
        if v["logits"]:
            lines.append(
                f"logits against transformers on {v['logits']['num_tokens']} tokens, float32: "
                f"largest difference {v['logits']['max_abs_error']:.2e}"
            )
        return "\n".join(lines)


def compare(
    ours: MegatronSource,
    theirs: HfTensors,
    geometry: Geometry,
    *,
    dtype: torch.dtype | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Report:
    """Read both directories and compare every tensor bit by bit.

    Args:
        dtype: what `theirs` are cast to first; None: compared as they are.
    Raises:
        CheckpointError: a tensor differs.
    """
    entries = {}
    for name in hf_shapes(geometry):
        entries[name] = _compare_tensor(name, ours, theirs, dtype, advance)
    different = [name for name, entry in entries.items() if not entry["identical"]]
    if different:
        raise CheckpointError(
            f"{ours.directory} and {theirs.directory} differ in {len(different)} of "
            f"{len(entries)} tensors ({', '.join(different[:3])}); the disk or the source changed "
            "during the conversion: run it again"
        )
    return Report(geometry, entries)


def _compare_tensor(
    name: str,
    ours: MegatronSource,
    theirs: HfTensors,
    dtype: torch.dtype | None,
    advance: Callable[[int], None],
) -> dict:
    """The tensor's entry in the report."""
    checksum, shape, stored = hashlib.sha256(), ours.shape(name), ours.dtype(name)
    identical = stored == (dtype or theirs.dtype(name)) and shape == theirs.shape(name)
    for block in row_blocks(shape):
        rows = ours.rows(name, *block)
        checksum.update(_bytes(rows).numpy().data)
        if identical:
            identical = torch.equal(_bytes(rows), _bytes(theirs.rows(name, *block).to(stored)))
        advance(rows.nbytes)
        del rows  # before the next block is made
    return {
        "dtype": str(stored).removeprefix("torch."),
        "shape": list(shape),
        "checksum": checksum.hexdigest()[:16],
        "identical": identical,
    }


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """As integers, so that NaN equals NaN and 0.0 is not -0.0; as wide as fits, for speed."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.int64 if flat.nbytes % 8 == 0 else torch.uint8)


def state_dtype(folder: Path, dtypes: set[torch.dtype]) -> None:
    """Let config.json name the dtype the weights have: transformers loads them as that."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    key = "dtype" if "dtype" in config else "torch_dtype"
    name = str(next(iter(dtypes))).removeprefix("torch.")
    if len(dtypes) == 1 and config.get(key) != name:
        path.write_text(json.dumps(config | {key: name}, indent=2) + "\n")
