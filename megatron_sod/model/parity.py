"""Whether student and teacher speak about the same tokens."""

from __future__ import annotations

from typing import Any

from megatron_sod.errors import DataError
from megatron_sod.model.geometry import Geometry


def check_same_vocabulary(
    student: Geometry, teacher: Geometry, student_tokenizer: Any, teacher_tokenizer: Any
) -> None:
    """Compare vocabularies by content: every id must mean the same piece in both.

    Raises:
        DataError: with the first difference.
    """
    if student.vocab_size != teacher.vocab_size:
        raise DataError(
            f"student and teacher differ in vocab_size: {student.vocab_size} against "
            f"{teacher.vocab_size}; distillation compares distributions over one vocabulary, so "
            "choose a teacher of the student's family"
        )
    left, right = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    for piece in sorted(left.keys() | right.keys()):
        if left.get(piece) != right.get(piece):
            raise DataError(
                f"student and teacher tokenizers differ: {piece!r} is id {left.get(piece)} for the "
                f"student and {right.get(piece)} for the teacher; use models that share a "
                "tokenizer"
            )
