"""Hermes calls out of sampled ids: what counts as a call, where it ends, what is malformed.

Layer: pure, with the tiny tokenizer. Running calls: tests/rollout/test_tools.py; what the student
reads back: tests/rollout/test_agent_loop.py.
"""

import json

import pytest

from megatron_sod.data.tiny_world import tool_call_text
from megatron_sod.rollout.tool_calls import ToolCallParser
from tests.helpers.tokenizers import qwen3_tokenizer, tiny_tokenizer


def _parse(text: str, tokenizer=None):
    tokenizer = tokenizer or tiny_tokenizer()
    ids = tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
    return ToolCallParser(tokenizer).parse(ids)


def _codes(text: str) -> list[str]:
    calls = _parse(text)
    assert all(call.problem is None and call.name == "code_interpreter" for call in calls)
    return [call.arguments["code"] for call in calls]


def _raw(code_json: str) -> str:
    """A call whose code string is given as it stands between the JSON quotes."""
    call = '{"name": "code_interpreter", "arguments": {"code": "' + code_json + '"}}'
    return f"<tool_call>\n{call}\n</tool_call>"


def test_a_call_is_found_with_its_code():
    assert _codes("I compute.\n" + tool_call_text("print(41+31)")) == ["print(41+31)"]


def test_a_turn_without_a_call_has_none():
    assert _parse("The answer is \\boxed{7}") == [] == _parse("")


CODES = [
    'print("</tool_call>")',
    'print("<tool_call>")',
    'x = "<tool_call>{}</tool_call>"\nprint(x)',
    'print({"a": [1, {"b": "}"}]})',
    "a = 'quote\\'s'\nb = \"\\n\"",
    "# \u00fc \u6f22\u5b57 \U0001f600",
    "",
    "print('<|im_start|>')",
]


@pytest.mark.parametrize("code", CODES)
def test_json_decides_where_a_call_ends_whatever_the_code_contains(code):
    assert _codes(tool_call_text(code)) == [code]


@pytest.mark.parametrize("code", CODES)
def test_a_second_call_is_found_behind_any_code(code):
    both = tool_call_text(code) + "\n" + tool_call_text("print(2)")
    assert _codes(both) == [code, "print(2)"]


def test_raw_newlines_and_tabs_inside_the_string_are_accepted():
    assert _codes(_raw("a = 1\nif a:\n\tprint(a)")) == ["a = 1\nif a:\n\tprint(a)"]


def test_several_calls_come_in_order():
    text = "".join(tool_call_text(f"print({i})") for i in range(3))
    assert _codes(text) == ["print(0)", "print(1)", "print(2)"]


def test_a_missing_closing_tag_does_not_lose_the_call():
    assert _codes(tool_call_text("print(1)").removesuffix("</tool_call>")) == ["print(1)"]


def test_calls_inside_a_thought_are_not_calls():
    thought = "<think>" + tool_call_text("print(1)") + "</think>"
    assert _parse(thought + "\\boxed{1}") == []
    assert _codes(thought + tool_call_text("print(2)")) == ["print(2)"]


def test_only_the_last_end_of_thought_counts():
    text = "</think>" + tool_call_text("print(1)") + "</think>" + tool_call_text("print(2)")
    assert _codes(text) == ["print(2)"]


def test_a_thought_that_never_ends_hides_nothing():
    assert _codes("<think>hm " + tool_call_text("print(1)")) == ["print(1)"]


def test_the_tag_spelled_out_of_ordinary_tokens_is_not_a_call():
    tokenizer = tiny_tokenizer()
    ids = []
    for part in ("<tool", "_call>", '{"name": "code_interpreter", "arguments": {"code": "1"}}'):
        ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    assert "<tool_call>" in tokenizer.decode(ids)
    assert ToolCallParser(tokenizer).parse(ids) == []


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("print(1)", "not valid JSON"),
        ("", "not valid JSON"),
        ('{"name": "code_interpreter", "arguments": {"code": "print(', "not valid JSON"),
        ("{'name': 'code_interpreter'}", "not valid JSON"),
        ('["code_interpreter"]', "must be"),
        ('{"arguments": {"code": "1"}}', "must be"),
        ('{"name": 3, "arguments": {}}', "must be"),
        ('{"name": "code_interpreter", "arguments": [1]}', "must be a JSON object"),
        ('{"name": "code_interpreter", "arguments": "print(1)"}', "arguments are not valid JSON"),
        ('{"name": "code_interpreter", "arguments": "[1]"}', "must be a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"name": "code_interpreter", "arguments": ' + "1" * 5000 + "}", "not valid JSON"),
        (
            '{"name": "code_interpreter", "arguments": "' + "[" * 100_000 + '"}',
            "arguments are not valid JSON",
        ),
        (
            '{"name": "code_interpreter", "arguments": "' + "1" * 5000 + '"}',
            "arguments are not valid JSON",
        ),
    ],
    ids=lambda value: value[:24],
)
def test_a_malformed_call_says_what_is_wrong(body, problem):
    (call,) = _parse(f"<tool_call>\n{body}\n</tool_call>")
    assert call.problem is not None and problem in call.problem


def test_a_good_call_after_a_malformed_one_is_kept():
    first, second = _parse("<tool_call>oops</tool_call>" + tool_call_text("print(1)"))
    assert first.problem and second.problem is None
    assert second.arguments == {"code": "print(1)"}


def test_arguments_quoted_once_more_are_unwrapped():
    quoted = json.dumps(json.dumps({"code": "print(1)"}))
    text = f'<tool_call>{{"name": "code_interpreter", "arguments": {quoted}}}</tool_call>'
    assert _codes(text) == ["print(1)"]


def test_a_call_without_arguments_is_a_call_without_arguments():
    (call,) = _parse('<tool_call>{"name": "code_interpreter"}</tool_call>')
    assert call.problem is None and call.arguments == {}


def test_a_tokenizer_that_spells_the_tag_in_several_tokens_works_too():
    class Spelled:
        unk_token_id = None

        def convert_tokens_to_ids(self, text):
            return None

        def decode(self, ids):
            return bytes(ids).decode()

    text = tool_call_text("print('<tool_call>')") + tool_call_text("print(2)")
    calls = ToolCallParser(Spelled()).parse(list(text.encode()))
    assert [call.arguments["code"] for call in calls] == ["print('<tool_call>')", "print(2)"]


def test_the_real_tokenizer_gives_the_same_calls():
    for code in CODES:
        calls = _parse("<think>\nx\n</think>\n\n" + tool_call_text(code), qwen3_tokenizer())
        assert [call.arguments for call in calls] == [{"code": code}]
