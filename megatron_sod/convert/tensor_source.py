"""Reading a model's Hugging Face tensors in boxes of bounded size, wherever they are stored.

A box is [start, start + size) of a tensor, one number per dimension. Only its bytes are read, with
plain reads: pages of a mapped file would count as memory of this process.
"""

from __future__ import annotations

import ctypes
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path

import torch

from megatron_sod.convert.layout import Segment, overlap
from megatron_sod.errors import CheckpointError

BLOCK_NUMEL = 2**23  # 16 MiB in bfloat16, 32 MiB in float32


class TensorSource(ABC):
    """The HF tensors of a model directory of either kind."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype: ...

    @abstractmethod
    def fill(self, target: torch.Tensor, name: str, start: Sequence[int]) -> None:
        """Read the box of `target`'s size from `start` on into it."""

    def rows(self, name: str, first: int, length: int) -> torch.Tensor:
        shape = self.shape(name)
        rows = torch.empty(length, *shape[1:], dtype=self.dtype(name))
        self.fill(rows, name, (first,) + (0,) * (len(shape) - 1))
        return rows


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first row, rows) that cover a tensor in blocks of at most BLOCK_NUMEL elements, or a row."""
    step = max(1, BLOCK_NUMEL // math.prod(shape[1:]))
    for first in range(0, shape[0], step):
        yield first, min(step, shape[0] - first)


def fill_local(
    target: torch.Tensor, start: Sequence[int], segments: Iterable[Segment], source: TensorSource
) -> None:
    """Read the box of a local parameter from `start` on; zero where no segment lies."""
    target.zero_()
    for s in segments:
        part = overlap(s.dim, s.local_start, s.hf_start, s.length, start, target.shape)
        if part:
            at, there, length = part
            source.fill(target.narrow(s.dim, at, length), s.hf_name, there)


def read_box(
    target: torch.Tensor,
    path: Path,
    offset: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    start: Sequence[int],
) -> None:
    """Fill `target` from the tensor that lies in row-major order at byte `offset` of a file.

    Of more than two dimensions, the leading ones have size 1 in the target.

    Raises:
        CheckpointError: the file ends before the box does.
    """
    rows, columns, row = target.view(-1, target.size(-1)), shape[-1], 0
    for extent, index in zip(shape[:-1], start[:-1], strict=True):
        row = row * extent + index
    one_range = len(rows) == 1 or rows.size(1) == columns
    packed = rows.is_contiguous() and rows.stride(1) == 1  # one number is contiguous at any stride
    with path.open("rb") as file:
        if one_range and packed and rows.dtype == dtype and rows.is_cpu:
            file.seek(offset + (row * columns + start[-1]) * dtype.itemsize)
            _read_into(rows, file)
            return
        file.seek(offset + row * columns * dtype.itemsize)
        for first, length in row_blocks((len(rows), columns)):
            block = torch.empty(length, columns, dtype=dtype)
            _read_into(block, file)
            rows[first : first + length] = block.narrow(1, start[-1], rows.size(1))


def _read_into(tensor: torch.Tensor, file: BufferedReader) -> None:
    # Not through numpy: it would forbid the storage to be resized for good, as offloading does.
    buffer = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    if (found := file.readinto(buffer)) != tensor.nbytes:
        raise CheckpointError(
            f"{file.name}: it ends {tensor.nbytes - found} bytes early; it was changed while it "
            "was read, try again"
        )
