"""Whether student and teacher speak about the same tokens, and about how many."""

from __future__ import annotations

from typing import Any

from megatron_sod.errors import DataError
from megatron_sod.model.geometry import Geometry


def shared_vocab_size(student: Geometry, teacher: Geometry | None) -> int:
    """How many ids the distributions of a run are over.

    Models of one family may pad the same tokenizer to different sizes (Qwen2.5: 151936 rows up to
    3B, 152064 above). Rows that only one of them has are padding: they have no probability.
    """
    return min(student.vocab_size, teacher.vocab_size) if teacher else student.vocab_size


def check_same_vocabulary(
    student: Geometry, teacher: Geometry, student_tokenizer: Any, teacher_tokenizer: Any
) -> None:
    """Compare vocabularies by content: every id must mean the same piece in both, and have a row.

    Raises:
        DataError: with the first difference.
    """
    left, right = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    for piece in sorted(left.keys() | right.keys()):
        if left.get(piece) != right.get(piece):
            raise DataError(
                f"student and teacher tokenizers differ: {piece!r} is id {left.get(piece)} for the "
                f"student and {right.get(piece)} for the teacher; use models that share a "
                "tokenizer"
            )
    num_rows, largest = shared_vocab_size(student, teacher), max(left.values(), default=0)
    if largest >= num_rows:
        raise DataError(
            f"the tokenizer has id {largest}, but student and teacher share only {num_rows} ids "
            f"(vocab_size {student.vocab_size} and {teacher.vocab_size}); give the smaller model "
            "an embedding that covers its tokenizer, or use models that do"
        )
