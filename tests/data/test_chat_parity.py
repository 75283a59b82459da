"""A teacher that reads chats differently is refused at the start. Layer: pure."""

import copy

import pytest

from megatron_sod.data.chat import ChatFormat
from megatron_sod.data.chat_parity import check_same_chat
from megatron_sod.data.sources import tool_schemas
from megatron_sod.errors import DataError
from tests.helpers.tokenizers import qwen3_tokenizer, tiny_tokenizer


def _chat(tokenizer, **options) -> ChatFormat:
    return ChatFormat(tokenizer, tools=tool_schemas(), **options)


def _with_template(tokenizer, change) -> object:
    other = copy.deepcopy(tokenizer)
    other.chat_template = change(tokenizer.chat_template)
    return other


def test_equal_templates_pass():
    for tokenizer in (tiny_tokenizer(), qwen3_tokenizer()):
        check_same_chat(_chat(tokenizer), lambda t=tokenizer: _chat(copy.deepcopy(t)))


def test_a_teacher_in_thinking_mode_is_refused_for_a_student_without():
    student = _chat(qwen3_tokenizer(), enable_thinking=False)
    with pytest.raises(DataError, match="assistant marker differently.*<think>") as caught:
        check_same_chat(student, lambda: _chat(qwen3_tokenizer(), enable_thinking=True))
    assert "allow_template_mismatch" in str(caught.value)


def test_a_template_that_knows_no_thinking_is_refused():
    """As the Instruct-2507 models': no empty thought in front of an answer."""
    plain = _with_template(
        qwen3_tokenizer(),
        lambda text: text.replace("'<think>\\n\\n</think>\\n\\n'", "''"),
    )
    assert plain.chat_template != qwen3_tokenizer().chat_template
    with pytest.raises(DataError, match="student and teacher render"):
        check_same_chat(_chat(qwen3_tokenizer()), lambda: _chat(plain))


def test_other_words_around_tool_results_are_refused():
    other = _with_template(
        qwen3_tokenizer(), lambda text: text.replace("<tool_response>", "<tool_output>")
    )
    with pytest.raises(DataError, match="two tool results differently"):
        check_same_chat(_chat(qwen3_tokenizer()), lambda: _chat(other))


def test_a_teacher_without_a_template_is_refused():
    other = copy.deepcopy(qwen3_tokenizer())
    other.chat_template = None
    with pytest.raises(DataError, match="teacher's chat format: .*no chat template"):
        check_same_chat(_chat(qwen3_tokenizer()), lambda: _chat(other))
