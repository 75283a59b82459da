"""Which conversations are trained on, and what is said about the others.

Layer: pure. Rendering itself: tests/data/test_chat.py; training on it: tests/train/test_sft.py.
"""

import json
import os
from pathlib import Path

import pytest

from megatron_sod.data import tiny_world
from megatron_sod.data.chat import ChatFormat
from megatron_sod.data.conversations import cold_start_data
from megatron_sod.data.sources import load_conversations
from megatron_sod.errors import DataError
from tests.helpers.tokenizers import qwen3_tokenizer, tiny_tokenizer


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(tiny_tokenizer(), tools=None)


def _dialogue(words: int) -> list[dict]:
    return [
        {"role": "user", "content": "q " * words},
        {"role": "assistant", "content": "a " * words},
    ]


def _found(chat, conversations, **options):
    return cold_start_data(conversations, chat, **({"max_length": 60, "overlong": "cut"} | options))


def test_items_are_the_renders_in_order(chat):
    messages = list(tiny_world.conversations(3, seed=1))
    found = _found(chat, messages, max_length=500)
    assert [i.token_ids for i in found.items] == [chat.conversation(m).token_ids for m in messages]
    assert [i.index for i in found.items] == [0, 1, 2]
    assert (found.num_cut, found.num_dropped, found.num_without_loss) == (0, 0, 0)
    assert found.num_loss_tokens == sum(sum(chat.conversation(m).loss_mask) for m in messages)


def test_long_conversations_are_cut_on_the_right_and_counted(chat, capsys):
    whole = chat.conversation(_dialogue(20))
    limit = len(whole.token_ids) - 7
    found = _found(chat, [_dialogue(2), _dialogue(20)], max_length=limit)
    assert found.num_cut == 1 and found.items[1].token_ids == whole.token_ids[:limit]
    assert found.items[1].loss_mask == whole.loss_mask[:limit]
    assert "1 cut and 0 dropped" in capsys.readouterr().err


def test_a_conversation_cut_before_its_answer_carries_no_loss_and_is_left_out(chat):
    found = _found(chat, [_dialogue(2), _dialogue(200)], max_length=60)
    assert len(found.items) == 1 and (found.num_cut, found.num_without_loss) == (1, 1)


def test_long_conversations_may_be_dropped_or_refused(chat):
    conversations = [_dialogue(2), _dialogue(200), _dialogue(3)]
    found = _found(chat, conversations, overlong="drop")
    assert len(found.items) == 2 and found.num_dropped == 1
    with pytest.raises(DataError, match="conversation 2: .* more than data.max_length 60"):
        _found(chat, conversations, overlong="error")


def test_a_conversation_that_cannot_be_rendered_is_named_by_its_place():
    chat = ChatFormat(qwen3_tokenizer(), tools=None)
    bad = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"},
    ]
    with pytest.raises(DataError, match="conversation 2: message 1: the turn holds a thought"):
        _found(chat, [_dialogue(1), bad], max_length=500)


@pytest.mark.skipif("SOD_SHARED_DATA" not in os.environ, reason="SOD_SHARED_DATA is not set")
def test_public_tool_conversations_render_with_the_real_tokenizer():
    path = Path(os.environ["SOD_SHARED_DATA"]) / "hermes_tir_gsm8k_from_tora70b_400.jsonl"
    rows = [json.loads(line) for line in path.open()][:25]
    chat = ChatFormat(qwen3_tokenizer(), tools=rows[0]["tools"])
    conversations = list(load_conversations([str(path)], seed=0))[:25]
    found = _found(chat, conversations, max_length=4096)
    assert len(found.items) == 25 and found.num_cut == 0
    for item, row in zip(found.items, rows, strict=True):
        turns = chat.decode([i for i, m in zip(item.token_ids, item.loss_mask, strict=True) if m])
        said = [m for m in row["messages"] if m["role"] == "assistant"]
        assert turns.count("<|im_end|>") == len(said) == 2
        code = said[0]["tool_calls"][0]["function"]["arguments"]["code"]
        assert json.dumps(code, ensure_ascii=False) in turns  # its call, as the template writes it
        assert turns.endswith(said[1]["content"] + "<|im_end|>")
        printed = next(m["content"] for m in row["messages"] if m["role"] == "tool")
        assert f"<tool_response>\n{printed}" not in turns
