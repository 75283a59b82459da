"""Student and teacher must speak about the same tokens, compared by content.

Layer: pure.
"""

from dataclasses import replace

import pytest

from megatron_sod.errors import DataError
from megatron_sod.model.geometry import geometry_from_hf
from megatron_sod.model.parity import check_same_vocabulary, shared_vocab_size
from tests.model.test_geometry import QWEN3

GEOMETRY = geometry_from_hf({**QWEN3, "vocab_size": 4})


class Vocabulary:
    """What the check asks of a tokenizer."""

    def __init__(self, **pieces: int):
        self._pieces = pieces

    def get_vocab(self) -> dict[str, int]:
        return dict(self._pieces)


def _check(student: Vocabulary, teacher: Vocabulary, *, vocab_size=4) -> None:
    check_same_vocabulary(GEOMETRY, replace(GEOMETRY, vocab_size=vocab_size), student, teacher)


def test_equal_vocabularies_pass_whatever_the_models_sizes():
    teacher = replace(GEOMETRY, hidden_size=2048, num_layers=36)
    check_same_vocabulary(GEOMETRY, teacher, Vocabulary(a=0, b=1), Vocabulary(b=1, a=0))


@pytest.mark.parametrize("vocab_size", [3, 5])
def test_a_teacher_may_pad_the_same_tokenizer_to_another_size(vocab_size):
    _check(Vocabulary(a=0, b=2), Vocabulary(a=0, b=2), vocab_size=vocab_size)
    teacher = replace(GEOMETRY, vocab_size=vocab_size)
    assert shared_vocab_size(GEOMETRY, teacher) == min(4, vocab_size)
    assert shared_vocab_size(GEOMETRY, None) == 4


def test_an_id_that_one_of_them_has_no_row_for_is_refused():
    with pytest.raises(DataError, match="has id 3, but student and teacher share only 3 ids"):
        _check(Vocabulary(a=0, b=3), Vocabulary(a=0, b=3), vocab_size=3)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ({"a": 0, "b": 1}, {"a": 1, "b": 0}, "'a' is id 0 for the student and 1 for the teacher"),
        ({"a": 0, "b": 1}, {"a": 0, "c": 1}, "'b' is id 1 for the student and None"),
        ({"a": 0}, {"a": 0, "z": 1}, "'z' is id None for the student and 1"),
    ],
)
def test_the_first_difference_is_shown(student, teacher, message):
    with pytest.raises(DataError, match=message):
        _check(Vocabulary(**student), Vocabulary(**teacher))
