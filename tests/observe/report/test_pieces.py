"""Every token gets the text it shows, also where a character is spread over tokens.

Layer: pure, with the tiny byte-level tokenizer.
"""

import pytest

from megatron_sod.observe.report.pieces import Pieces
from tests.helpers.tokenizers import tiny_tokenizer
from tests.observe.report.runs import ids


def _shown(pieces: Pieces, token_ids: list[int]) -> list[str]:
    return [pieces.table[index] for index in pieces.add(token_ids)]


@pytest.mark.parametrize(
    "text", ["print(1)\n  x", "naïve – 日本語 🙂!", "<tool_call>\n{}</tool_call><|im_end|>", ""]
)
def test_the_pieces_make_up_the_text(text):
    shown = _shown(Pieces(tiny_tokenizer()), ids(text))
    assert "".join(shown) == text and len(shown) == len(ids(text))


def test_a_spread_character_stands_on_its_first_token():
    token_ids = ids("é")
    assert len(token_ids) == 2  # two bytes, no merge for them in the tiny tokenizer
    assert _shown(Pieces(tiny_tokenizer()), token_ids) == ["é", ""]


def test_half_a_character_is_shown_as_such():
    shown = _shown(Pieces(tiny_tokenizer()), ids("é")[:1] + ids("a"))
    assert shown[0] == "\ufffd" and shown[1] == "a"


def test_ids_beyond_the_tokenizer_are_shown_as_ids():
    assert _shown(Pieces(tiny_tokenizer()), [100_000]) == ["[100000]"]


def test_without_a_tokenizer_the_ids_are_shown():
    assert _shown(Pieces(None), [5, 7, 5]) == ["[5] ", "[7] ", "[5] "]


def test_the_table_has_no_repeats():
    pieces = Pieces(tiny_tokenizer())
    pieces.add(ids("print(1)") * 3)
    assert len(pieces.table) == len(set(pieces.table))
