"""The tiny tokenizer: exact size, single digits, control tokens, nothing lost.

Layer: pure (trains the tokenizer once). Chat rendering: tests/data/test_chat.py.
"""

import pytest

from megatron_sod.data.tiny_tokenizer import (
    CONTROL_TOKENS,
    MARKUP_TOKENS,
    save_tiny_tokenizer,
    train_tiny_tokenizer,
)
from megatron_sod.data.tokenizer import load_tokenizer
from megatron_sod.errors import DataError


@pytest.fixture(scope="module")
def tokenizer():
    return train_tiny_tokenizer()


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_size_the_conversations_cannot_fill_is_refused():
    with pytest.raises(DataError, match="397 were asked for"):
        train_tiny_tokenizer(397, num_conversations=60)


@pytest.mark.parametrize("size", [301, 384])
def test_the_vocabulary_has_exactly_the_asked_size(size):
    tokenizer = train_tiny_tokenizer(size, num_conversations=60)
    assert len(tokenizer) == size
    assert sorted(tokenizer.get_vocab().values()) == list(range(size))


def test_every_control_and_markup_token_is_one_id(tokenizer):
    for text in (*CONTROL_TOKENS, *MARKUP_TOKENS):
        assert len(_ids(tokenizer, f"a{text}b")) == len(_ids(tokenizer, "a")) + 2


def test_markup_survives_decoding_without_special_tokens(tokenizer):
    # as in Qwen3: <tool_call> and <think> are added tokens but not special ones
    text = "<think>x</think><tool_call>1</tool_call><|im_end|>"
    kept = tokenizer.decode(_ids(tokenizer, text), skip_special_tokens=True)
    assert kept == "<think>x</think><tool_call>1</tool_call>"


def test_every_digit_is_one_token_in_any_number(tokenizer):
    for text in ("9075", "print(-100*9)", "3.25"):
        pieces = [tokenizer.decode([token]) for token in _ids(tokenizer, text)]
        assert sum(piece.isdigit() for piece in pieces) == sum(c.isdigit() for c in text)
        assert all(len(piece) == 1 for piece in pieces if any(c.isdigit() for c in piece))


@pytest.mark.parametrize(
    "text",
    [
        "Compute left to right: 41 + 31 * 7",
        " leading and trailing ",
        "tabs\tand\r\nlines\n\n",
        "umlaut \u00fc, CJK \u6f22\u5b57, emoji \U0001f600, combining e\u0301",
        "",
        "\x00\x7f\ufffd",
    ],
)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(_ids(tokenizer, text)) == text


def test_training_is_deterministic(tokenizer):
    assert train_tiny_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_a_saved_tokenizer_loads_with_the_same_ids_and_template(tokenizer, tmp_path):
    save_tiny_tokenizer(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
