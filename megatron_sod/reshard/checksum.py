"""64-bit checksums of parts of tensors, equal wherever and however the part is laid out.

    h = sum over rows r and 8-byte words c of  a_r * b_c * word[r, c]     modulo 2^64

a and b are odd pseudo-random numbers that depend on the place in the whole tensor, so a permuted or
shifted part has another sum, and one changed word always changes it. Not cryptographic: it guards
against mistakes, not against an adversary. Reads the part once, at memory speed.
"""

from __future__ import annotations

from functools import lru_cache

import torch

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_ROWS_AT_ONCE_BYTES = 64 << 20  # on a GPU, where an integer product needs a temporary


def checksum(part: torch.Tensor, *, dim: int, start: int) -> torch.Tensor:
    """Checksum of indices [start, ...) along `dim` of a tensor.

    Args:
        part: one- or two-dimensional, any strides.
    Returns:
        scalar int64 tensor on the part's device; the sum wraps at 2^64.
    """
    rows, columns = (start, 0) if dim == 0 else (0, start)
    if part.dim() == 1:
        part, rows, columns = part.unsqueeze(0), 0, start
    size = part.element_size()
    word = next(w for w in _WORDS if columns * size % w == 0 and part.shape[1] * size % w == 0)
    words = _as_words(part, word)
    column_weights = _weights(columns * size // word, words.shape[1], 1, words.device)
    row_weights = _weights(rows, words.shape[0], 2, words.device)
    return (_row_sums(words, column_weights) * row_weights).sum()


def as_unsigned(value: int) -> int:
    return value % (1 << 64)


def _as_words(part: torch.Tensor, word: int) -> torch.Tensor:
    try:
        return part.view(_WORDS[word])
    except RuntimeError:  # strides or an offset that words do not divide
        return part.contiguous().view(_WORDS[word])


def _row_sums(words: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    if words.device.type == "cpu":
        return words.to(torch.int64) @ weights  # ten times the speed of product and sum
    step = max(1, _ROWS_AT_ONCE_BYTES // (8 * words.shape[1]))
    return torch.cat([(chunk.to(torch.int64) * weights).sum(1) for chunk in words.split(step)])


@lru_cache(maxsize=64)
def _weights(start: int, count: int, salt: int, device: torch.device) -> torch.Tensor:
    """Odd int64 numbers of the places [start, start + count)."""
    x = torch.arange(start, start + count, dtype=torch.int64, device=device)
    x = (x + (salt << 40)) * -7046029254386353131
    x = (x ^ (x >> 29)) * -4658895280553007687
    x = (x ^ (x >> 32)) * -7723592293110705685
    return (x ^ (x >> 30)) | 1
