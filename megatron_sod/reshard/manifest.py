"""What a trainer rank offers: pieces of HF tensors and where their bytes lie. Plain data."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

_ALIGNMENT = 64


@dataclass(frozen=True)
class Piece:
    """A part of one HF tensor: indices [start, start + shape[dim]) along `dim`."""

    hf_name: str
    dim: int
    start: int
    shape: tuple[int, ...]
    dtype: str  # "float32"
    file: str
    offset_bytes: int

    @property
    def num_bytes(self) -> int:
        size = torch.empty((), dtype=getattr(torch, self.dtype)).element_size()
        for extent in self.shape:
            size *= extent
        return size


class SharedPieces:
    """One rank's pieces in a shared-memory file, rewritten at every transfer.

    The file lives on /dev/shm where that exists: same-host transfer without a socket.
    """

    def __init__(
        self,
        folder: str | Path,
        rank: int,
        pieces: Iterable[tuple[str, int, int, tuple]],
        dtype: torch.dtype,
    ):
        """`pieces`: (hf_name, dim, start, shape) in the order `publish` will get the tensors."""
        self._path = Path(folder) / f"rank{rank}.weights"
        name, offset = str(dtype).removeprefix("torch."), 0
        self.pieces: list[Piece] = []
        for hf_name, dim, start, shape in pieces:
            piece = Piece(hf_name, dim, start, tuple(shape), name, str(self._path), offset)
            self.pieces.append(piece)
            offset += -(-piece.num_bytes // _ALIGNMENT) * _ALIGNMENT
        self._path.write_bytes(b"")
        os.truncate(self._path, max(offset, mmap.PAGESIZE))
        self._file = self._path.open("r+b")
        self._map = mmap.mmap(self._file.fileno(), 0)

    def publish(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy this rank's current weights into the shared file."""
        for piece, tensor in zip(self.pieces, tensors, strict=True):
            _view(self._map, piece).copy_(tensor)

    def close(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


class PieceReader:
    """The engine's side: assembles HF tensors from the ranks' files, one at a time."""

    def __init__(self, pieces: list[dict], shapes: dict[str, list[int]]):
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._pieces: dict[str, list[Piece]] = {}
        for fields in pieces:
            piece = Piece(**{**fields, "shape": tuple(fields["shape"])})
            self._pieces.setdefault(piece.hf_name, []).append(piece)
        self._maps: dict[str, mmap.mmap] = {}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor) for every HF tensor; the copy is private to the caller."""
        for name, shape in self._shapes.items():
            held = self._pieces.get(name, [])
            covered, extent = _covered(held), shape[held[0].dim] if held else shape[0]
            if covered != extent:
                raise ValueError(
                    f"weight transfer: the trainer offers {covered} of {extent} indices of {name}"
                )
            whole = torch.empty(shape, dtype=getattr(torch, held[0].dtype))
            for piece in held:
                target = whole.narrow(piece.dim, piece.start, piece.shape[piece.dim])
                target.copy_(_view(self._map_of(piece.file), piece))
            yield name, whole

    def _map_of(self, path: str) -> mmap.mmap:
        if path not in self._maps:
            with open(path, "r+b") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0)
        return self._maps[path]


def _covered(pieces: list[Piece]) -> int:
    """How many indices the pieces cover; indices offered twice count once."""
    end = covered = 0
    for start, stop in sorted((p.start, p.start + p.shape[p.dim]) for p in pieces):
        covered += max(0, stop - max(start, end))
        end = max(end, stop)
    return covered


def as_dicts(pieces: Iterable[Piece]) -> list[dict]:
    """Pieces as plain data, for a control message."""
    return [asdict(piece) for piece in pieces]


def _view(memory: mmap.mmap, piece: Piece) -> torch.Tensor:
    count = 1
    for extent in piece.shape:
        count *= extent
    flat = torch.frombuffer(
        memory, dtype=getattr(torch, piece.dtype), count=count, offset=piece.offset_bytes
    )
    return flat.view(piece.shape)
