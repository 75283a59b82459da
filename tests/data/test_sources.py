"""Prompts and conversations by name: files, the tiny world, and rows that cannot be used.

Layer: pure, with files in a temporary folder. Rendering: tests/data/test_chat.py.
"""

import json

import pytest

from megatron_sod.data.chat import ChatFormat
from megatron_sod.data.sources import load_conversations, load_prompts
from megatron_sod.errors import DataError
from tests.helpers.tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(tiny_tokenizer(), tools=None)


def _jsonl(path, rows) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def _prompts(source: str, chat, *, max_length=400, prompt_key="prompt", answer_key="answer"):
    return load_prompts(
        [source], chat, prompt_key=prompt_key, answer_key=answer_key, max_length=max_length
    )


ROWS = [
    {"question": "What is 2+2?", "answer": "4", "data_source": "gsm8k"},
    {"question": [{"role": "user", "content": "3*3"}], "answer": 9},
]


def _check(prompts, chat, source):
    assert [p.answer for p in prompts] == ["4", "9"]
    assert [p.data_source for p in prompts] == ["gsm8k", "p"]  # its own, or its file's
    assert [p.prompt_id for p in prompts] == [f"{source}:0", f"{source}:1"]
    assert prompts[0].messages == [{"role": "user", "content": "What is 2+2?"}]
    for prompt in prompts:
        assert prompt.token_ids == chat.prompt_ids(prompt.messages)


def test_jsonl_rows_become_rendered_prompts(chat, tmp_path):
    source = _jsonl(tmp_path / "p.jsonl", [*ROWS[:1], "", *ROWS[1:]])
    _check(_prompts(source, chat, prompt_key="question"), chat, source)


def test_parquet_rows_become_the_same_prompts(chat, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{**ROWS[0], "question": [{"role": "user", "content": "What is 2+2?"}]}]
    rows.append({**ROWS[1], "answer": "9", "data_source": None})
    source = str(tmp_path / "p.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    _check(_prompts(source, chat, prompt_key="question"), chat, source)


def test_the_tiny_world_is_a_source_with_an_optional_range(chat):
    prompts = _prompts("tiny_world:heldout:7:2-2", chat)
    assert len(prompts) == 7 and {p.data_source for p in prompts} == {"tiny_world"}
    assert all(p.messages[0]["content"].count(" ") == 8 for p in prompts)  # two operations
    assert [p.prompt_id for p in _prompts("tiny_world:train:2", chat)] == [
        "tiny_world:train:2:0",
        "tiny_world:train:2:1",
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q"}, r"row 2: no value under 'answer'; found keys \['prompt'\]"),
        ({"prompt": "", "answer": "1"}, "row 2: no value under 'prompt'"),
        ({"prompt": None, "answer": "1"}, "row 2: no value under 'prompt'"),
        ({"prompt": 17, "answer": "1"}, "row 2: 'prompt' must be text or a list of messages"),
        ({"prompt": [], "answer": "1"}, "row 2: 'prompt' must be text or a list of messages"),
        ({"prompt": [{"content": "x"}], "answer": "1"}, "row 2: 'prompt' must be text or a list"),
        ({"prompt": [{"role": "user", "content": None}], "answer": "1"}, "row 2: 'prompt' must"),
        ("{not json", "row 2: not valid JSON"),
        ('["a"]', "row 2: expected an object"),
    ],
)
def test_a_bad_row_is_named_by_file_and_row(chat, tmp_path, row, message):
    source = _jsonl(tmp_path / "bad.jsonl", [{"prompt": "q", "answer": "1"}, row])
    with pytest.raises(DataError, match=message) as caught:
        _prompts(source, chat)
    assert str(tmp_path / "bad.jsonl") in str(caught.value)


def test_row_numbers_count_empty_lines_as_an_editor_does(chat, tmp_path):
    source = _jsonl(tmp_path / "bad.jsonl", [{"prompt": "q", "answer": "1"}, "", "{"])
    with pytest.raises(DataError, match="row 3"):
        _prompts(source, chat)


def test_an_answer_of_zero_is_an_answer(chat, tmp_path):
    source = _jsonl(tmp_path / "p.jsonl", [{"prompt": "1-1", "answer": 0}])
    assert _prompts(source, chat)[0].answer == "0"


def test_a_byte_order_mark_is_not_part_of_the_first_row(chat, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "q", "answer": "1"}\n', encoding="utf-8-sig")
    assert len(_prompts(str(path), chat)) == 1


def test_a_file_in_another_encoding_is_named(chat, tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "\u00fc", "answer": "1"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match="latin.jsonl"):
        _prompts(str(path), chat)


def test_a_file_that_is_no_parquet_is_named(chat, tmp_path):
    path = tmp_path / "p.parquet"
    path.write_text("not parquet")
    with pytest.raises(DataError, match="p.parquet"):
        _prompts(str(path), chat)


@pytest.mark.parametrize("source", ["nowhere.jsonl", "tiny_world:train", "tiny_world:train:x"])
def test_a_missing_file_is_named_with_the_forms_that_work(chat, source):
    with pytest.raises(DataError, match="tiny_world:SPLIT:COUNT") as caught:
        _prompts(source, chat)
    assert source in str(caught.value)


def test_an_unknown_split_is_refused(chat):
    with pytest.raises(DataError, match="unknown split 'test'"):
        _prompts("tiny_world:test:3", chat)


def test_overlong_prompts_are_left_out_and_counted(chat, tmp_path, capsys):
    rows = [{"prompt": "x " * n, "answer": "1"} for n in (1, 300, 2, 400)]
    prompts = _prompts(_jsonl(tmp_path / "p.jsonl", rows), chat, max_length=200)
    assert [p.prompt_id[-1] for p in prompts] == ["0", "2"]
    assert "2 prompts longer than 200 tokens left out" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [[], [{"prompt": "x " * 900, "answer": "1"}]])
def test_nothing_usable_is_an_error(chat, tmp_path, rows):
    with pytest.raises(DataError, match="no usable prompt"):
        _prompts(_jsonl(tmp_path / "p.jsonl", rows), chat)


def test_conversations_come_from_files_and_from_the_tiny_world(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    source = _jsonl(tmp_path / "c.jsonl", [{"messages": messages}])
    found = list(load_conversations([source, "tiny_world:train:5"], seed=1))
    assert found[0] == messages and len(found) == 6


def test_conversations_never_come_from_held_out_tasks():
    with pytest.raises(DataError, match="train split only"):
        list(load_conversations(["tiny_world:heldout:5"], seed=0))


@pytest.mark.parametrize("row", [{"prompt": "x"}, {"messages": "x"}, {"messages": []}])
def test_a_row_without_messages_is_named(tmp_path, row):
    source = _jsonl(tmp_path / "c.jsonl", [row])
    with pytest.raises(DataError, match="c.jsonl row 1: no list `messages`"):
        list(load_conversations([source], seed=0))


def test_csv_rows_become_prompts(chat, tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('prompt,answer\n"a, b\nc",7\nq,8\n')
    prompts = _prompts(str(path), chat)
    assert [(p.messages[0]["content"], p.answer) for p in prompts] == [("a, b\nc", "7"), ("q", "8")]


def test_a_csv_row_with_missing_cells_is_named(chat, tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("prompt,answer\na,1\nb\n")
    with pytest.raises(DataError, match="p.csv row 2: not as many cells"):
        _prompts(str(path), chat)


def test_a_hint_is_kept_for_a_privileged_teacher(chat, tmp_path):
    rows = [{"prompt": "q", "answer": "1", "hint": "look"}, {"prompt": "q", "answer": "1"}]
    assert [p.hint for p in _prompts(_jsonl(tmp_path / "p.jsonl", rows), chat)] == ["look", ""]
