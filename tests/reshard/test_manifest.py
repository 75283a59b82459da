"""Pieces of tensors through the shared file, byte for byte, and what an incomplete offer says.

Layer: pure, one process plays all ranks. Between real ranks and engines:
tests/reshard/test_transfer.py.
"""

import json

import pytest
import torch

from megatron_sod.reshard.manifest import Piece, PieceReader, SharedPieces, as_dicts

# Two ranks: columns split over both, rows split unevenly, one tensor on rank 1 alone.
SHAPES = {"proj": [5, 6], "embed": [7, 3], "norm": [9]}
SPLIT = [
    [("proj", 1, 0, (5, 3)), ("embed", 0, 0, (4, 3))],
    [("proj", 1, 3, (5, 3)), ("embed", 0, 4, (3, 3)), ("norm", 0, 0, (9,))],
]


def _whole(dtype, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}


def _offer(tmp_path, dtype=torch.float32) -> list[SharedPieces]:
    return [SharedPieces(tmp_path, rank, pieces, dtype) for rank, pieces in enumerate(SPLIT)]


def _publish(ranks, whole):
    for rank, pieces in zip(ranks, SPLIT, strict=True):
        rank.publish(whole[n].narrow(dim, start, shape[dim]) for n, dim, start, shape in pieces)


def _reader(ranks, drop=()) -> PieceReader:
    pieces = [piece for rank in ranks for piece in as_dicts(rank.pieces)]
    kept = [piece for number, piece in enumerate(pieces) if number not in drop]
    return PieceReader(json.loads(json.dumps(kept)), SHAPES)  # as a control message carries them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_round_trip_bit_exactly_in_the_order_asked_for(tmp_path, dtype):
    ranks, whole = _offer(tmp_path, dtype), _whole(dtype)
    reader = _reader(ranks)
    _publish(ranks, whole)
    found = list(reader.tensors())
    assert [name for name, _ in found] == list(SHAPES)
    for name, tensor in found:
        assert tensor.dtype == dtype and torch.equal(tensor, whole[name])


def test_publishing_again_shows_the_new_weights_and_leaves_copies_alone(tmp_path):
    ranks = _offer(tmp_path)
    reader = _reader(ranks)
    _publish(ranks, _whole(torch.float32, seed=1))
    first = dict(reader.tensors())
    _publish(ranks, _whole(torch.float32, seed=2))
    second = dict(reader.tensors())
    for name in SHAPES:
        assert torch.equal(first[name], _whole(torch.float32, seed=1)[name])
        assert torch.equal(second[name], _whole(torch.float32, seed=2)[name])


def test_pieces_do_not_overlap_in_the_file(tmp_path):
    for rank in _offer(tmp_path, torch.bfloat16):
        spans = sorted((p.offset_bytes, p.offset_bytes + p.num_bytes) for p in rank.pieces)
        assert all(start % 64 == 0 for start, _ in spans)
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))


def test_a_piece_knows_its_size():
    assert Piece("x", 0, 0, (5, 3), "bfloat16", "f", 0).num_bytes == 30
    assert Piece("x", 0, 0, (7,), "float64", "f", 0).num_bytes == 56


# Pieces in the offer's order: 0 proj left, 1 embed top, 2 proj right, 3 embed bottom, 4 norm
@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ([0], "3 of 6 indices of proj"),
        ([3], "4 of 7 indices of embed"),
        ([4], "0 of 9 indices of norm"),
    ],
)
def test_a_missing_piece_is_an_error_naming_the_tensor(tmp_path, drop, message):
    ranks = _offer(tmp_path)
    _publish(ranks, _whole(torch.float32))
    with pytest.raises(ValueError, match=message):
        dict(_reader(ranks, drop).tensors())


def test_a_gap_hidden_by_an_overlap_is_an_error_too(tmp_path):
    ranks = _offer(tmp_path)
    _publish(ranks, _whole(torch.float32))
    pieces = [piece for rank in ranks for piece in as_dicts(rank.pieces)]
    pieces[2] = pieces[0]  # the left half twice: six indices, of which three differ
    with pytest.raises(ValueError, match="proj"):
        dict(PieceReader(pieces, SHAPES).tensors())


def test_publishing_too_few_tensors_is_an_error(tmp_path):
    rank = _offer(tmp_path)[0]
    with pytest.raises(ValueError, match="shorter"):
        rank.publish([torch.zeros(5, 3)])


def test_closing_removes_the_file(tmp_path):
    ranks = _offer(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    for rank in ranks:
        rank.close()
    assert list(tmp_path.iterdir()) == []


def test_a_rank_without_pieces_publishes_nothing(tmp_path):
    empty = SharedPieces(tmp_path, 0, [], torch.float32)
    empty.publish([])
    assert empty.pieces == []
