"""Public data sets by their columns: the task, its answer, and never a private test in a prompt.

Layer: pure; rows have the columns and value forms of the real files. Packed LiveCodeBench tests:
tests/data/test_livecodebench.py; files and plain rows: tests/data/test_sources.py.
"""

import base64
import json
import os
import pickle
import zlib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_sod.data.benchmarks import read_task
from megatron_sod.data.chat import ChatFormat
from megatron_sod.data.instructions import with_instructions
from megatron_sod.data.sources import load_conversations, load_prompts
from megatron_sod.errors import DataError
from megatron_sod.rollout.code_tests import CodeTests, is_code_task
from megatron_sod.rollout.rewards import grade_auto
from megatron_sod.types import Prompt
from tests.helpers.tokenizers import tiny_tokenizer

BOXED, LETTER, PROGRAM = "Put the final answer in \\boxed{}", "the letter", "```python"
SECRET = "31337 31338"
TESTS = {"inputs": [SECRET, "2"], "outputs": ["99887766", "4"]}


def _rl(source, truth, content="How many?", ability="math") -> dict:
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": content}],
        "ability": ability,
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": "7"},
    }


def _packed(tests) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


LCB = {
    "question_title": "sum",
    "question_content": "Add the numbers. Sample input: 1 2. Sample output: 3",
    "platform": "atcoder",
    "question_id": "abc1_a",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps([{"input": "1 2", "output": "3", "testtype": "stdin"}]),
    "private_test_cases": _packed([{"input": SECRET, "output": "99887766", "testtype": "stdin"}]),
    "metadata": "{}",
}
GPQA = {
    "Record ID": "rec1",
    "Question": "Which particle?",
    "Correct Answer": "muon ",
    "Incorrect Answer 1": "tau",
    "Incorrect Answer 2": "pion",
    "Incorrect Answer 3": "kaon",
}
# name: (row, answer or tests, data source ("": its file's name), what the prompt asks for)
ROWS = {
    "dapo": (_rl("math_dapo", "34"), "34", "math_dapo", BOXED),
    "science": (_rl("mega-science", "0.5"), "0.5", "mega-science", BOXED),
    "skywork math": (_rl("train-math-aops", ["12"]), "12", "train-math-aops", BOXED),
    "skywork code": (_rl("train-code-taco", json.dumps(TESTS)), TESTS, "train-code-taco", PROGRAM),
    "code as struct": (
        _rl("train-code-x", {**TESTS, "fn_name": None}), TESTS, "train-code-x", PROGRAM,
    ),
    "leetcode": (
        _rl("train-code-leetcode", json.dumps({"assert_case": ["assert f(1) == 2"]})),
        {"assert_case": ["assert f(1) == 2"]}, "train-code-leetcode", PROGRAM,
    ),
    "aime24": ({"Problem": "Find x.", "Answer": 25}, "25", "", BOXED),
    "aime25": (
        {"problem": "Find x.", "answer": "336^\\circ", "data_source": "aime2025"},
        "336^\\circ", "aime2025", BOXED,
    ),
    "gpqa eval": (
        {"problem": "Which? A) a B) b", "solution": "B", "domain": "physics",
         "data_source": "gpqa"}, "B", "gpqa", LETTER,
    ),
    "math with a worked solution": (
        {"problem": "1+1?", "solution": "Add them.", "answer": "2"}, "2", "", BOXED,
    ),
    "lcb eval": (
        {"problem": "Add.", "data_source": "lcb", "ability": "code",
         "reward_model": json.dumps({"ground_truth": TESTS}), "extra_info": "{}"},
        TESTS, "lcb", PROGRAM,
    ),
    "lcb": (LCB, {"inputs": ["1 2", SECRET], "outputs": ["3", "99887766"]},
            "", PROGRAM),
    "gsm8k": ({"question": "2+2?", "answer": "so\n#### 4"}, "so\n#### 4", "", BOXED),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_read_by_its_own_columns(name):
    row, answer, source, asks = ROWS[name]
    task = read_task(row, "f row 1")
    found = json.loads(task.answer) if isinstance(answer, dict) else task.answer
    if isinstance(answer, dict):
        assert {k: v for k, v in found.items() if v is not None} == answer
        assert is_code_task(Prompt("p", [], task.answer, source))
        assert CodeTests.parse(task.answer)
    else:
        assert found == answer
    assert asks in task.messages[-1]["content"]


@pytest.mark.parametrize("name", ROWS)
def test_no_private_test_reaches_a_prompt(name):
    task = read_task(ROWS[name][0], "f row 1")
    text = json.dumps(task.messages)
    assert SECRET not in text and "99887766" not in text


def test_every_row_of_a_mixed_file_gets_the_instruction_of_its_own_kind(tmp_path):
    """The reference takes the kind of the first row for the whole file."""
    names = ["dapo", "skywork code", "science", "leetcode"]
    rows = [ROWS[name][0] for name in names]
    for row in rows:
        row["reward_model"]["ground_truth"] = str(row["reward_model"]["ground_truth"])
    path = tmp_path / "mixed.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    chat = ChatFormat(tiny_tokenizer(), tools=None)
    prompts = load_prompts(
        [str(path)], chat, prompt_key="prompt", answer_key="answer", max_length=4000
    )
    asked = [(BOXED in p.messages[0]["content"], PROGRAM in p.messages[0]["content"])
             for p in prompts]  # fmt: skip
    assert asked == [(True, False), (False, True), (True, False), (False, True)]
    assert [p.data_source for p in prompts] == [ROWS[name][2] for name in names]


def test_files_of_one_form_are_reported_apart_and_rows_keep_their_own_name(tmp_path):
    expected = {
        "aime24.jsonl": "aime24",
        "aime25.jsonl": "aime25",
        "main/test.jsonl": "main-test",
        "diamond/test.jsonl": str(tmp_path / "diamond/test.jsonl"),
        "diamond/test.json": str(tmp_path / "diamond/test.json"),
        "a/tiny_world.jsonl": "a-tiny_world",  # a name that would be graded exactly
    }
    row = {"problem": "Find x.", "answer": "25", "id": "1"}
    for name in expected:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(
            json.dumps(row) + "\n" + json.dumps({**row, "data_source": "own"})
        )
    chat = ChatFormat(tiny_tokenizer(), tools=None)
    files = [str(tmp_path / name) for name in expected]
    prompts = load_prompts(files, chat, prompt_key="p", answer_key="a", max_length=4000)
    assert [p.data_source for p in prompts[::2]] == list(expected.values())
    assert {p.data_source for p in prompts[1::2]} == {"own"}
    assert {grade_auto(p, "\\boxed{25.0}") for p in prompts} == {1.0}  # whatever the file is called


def test_a_prompt_that_says_how_to_answer_is_not_told_again():
    content = "What is 1+1? Write it in \\boxed{}."
    task = read_task(_rl("math_dapo", "2", content), "o")
    assert task.messages[0]["content"].count("\\boxed") == 1
    assert with_instructions("x", "math").count("\\boxed") == 1


def test_a_system_message_and_own_wording_are_kept():
    row = _rl("math_dapo", "2")
    row["prompt"] = [{"role": "system", "content": "Be brief."}, *row["prompt"]]
    task = read_task(row, "o")
    assert task.messages[0] == {"role": "system", "content": "Be brief."}
    assert "plan first" not in task.messages[1]["content"]


def test_choices_stand_in_a_fixed_order_and_the_letter_follows():
    task = read_task(GPQA, "o")
    text = task.messages[0]["content"]
    assert f"{task.answer}) muon" in text and task == read_task(dict(GPQA), "o")
    orders = {read_task({**GPQA, "Question": f"Q{i}"}, "o").answer for i in range(40)}
    assert orders == set("ABCD")


def test_a_function_task_shows_its_starter_code_and_names_its_function():
    row = {**LCB, "starter_code": "class Solution:\n    def add(self, a):",
           "metadata": json.dumps({"func_name": "add"})}  # fmt: skip
    task = read_task(row, "o")
    assert "def add(self, a):" in task.messages[0]["content"]
    assert "standard input" not in task.messages[0]["content"]
    assert json.loads(task.answer)["fn_name"] == "add"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (_rl("train-code-taco", "42"), "names a code task, but its ground truth is not tests"),
        (_rl("math_dapo", None), "no reward_model.ground_truth"),
        (_rl("math_dapo", "2", content=""), "'prompt' must be messages"),
        ({**_rl("m", "2"), "reward_model": "not json"}, "no reward_model.ground_truth"),
        ({"problem": "x", "reward_model": '{"ground_truth": "3"}'}, "no inputs and outputs"),
        ({"Problem": 3, "Answer": 4}, "'Problem' must be text"),
        ({**LCB, "private_test_cases": "!!"}, "neither JSON nor base64 of zlib"),
        ({**LCB, "private_test_cases": [{"in": 1}]}, "needs input and output"),
        ({"content": "x", "id": 1}, "no value under 'prompt'"),
        ({"content": "x", "test": {"input_output": "3"}}, "test.input_output must be JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_row(tmp_path, row, message):
    path = tmp_path / "bench.jsonl"
    path.write_text(json.dumps(ROWS["aime24"][0]) + "\n" + json.dumps(row) + "\n")
    chat = ChatFormat(tiny_tokenizer(), tools=None)
    with pytest.raises(DataError, match=message) as caught:
        load_prompts([str(path)], chat, prompt_key="prompt", answer_key="answer", max_length=4000)
    assert f"{path} row 2" in str(caught.value)


@pytest.mark.parametrize("row", [{"a": 1}, {"problem": "x"}, {"problem": "x", "solution": "long"}])
def test_unknown_columns_are_nobodys(row):
    assert read_task(row, "o") is None


def test_named_columns_win_over_what_the_row_looks_like(tmp_path):
    chat = ChatFormat(tiny_tokenizer(), tools=None)
    path = tmp_path / "named.jsonl"
    path.write_text(json.dumps({"problem": "raw", "answer": "5"}) + "\n")
    (prompt,) = load_prompts(
        [str(path)], chat, prompt_key="problem", answer_key="answer", max_length=400
    )
    assert prompt.messages[0]["content"] == "raw"


def test_cold_start_rows_lose_parquets_empty_columns_and_foreign_tools_are_said(tmp_path, capsys):
    call = {"type": "function", "function": {"name": "search", "arguments": '{"q": "x"}'}}
    messages = [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_calls": None},
        {"role": "assistant", "content": "done", "tool_calls": None},
    ]
    tools = json.dumps([{"type": "function", "function": {"name": "search"}}])
    path = tmp_path / "sft.parquet"
    rows = [{"messages": messages, "tools": tools, "enable_thinking": False}] * 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = list(load_conversations([str(path)], seed=0))
    assert found[0][0] == {"role": "user", "content": "q"}
    assert found[0][1]["content"] == "" and found[0][1]["tool_calls"][0]["type"] == "function"
    assert "2 conversations" in capsys.readouterr().err


@pytest.mark.skipif("SOD_SHARED_DATA" not in os.environ, reason="SOD_SHARED_DATA is not set")
def test_public_code_samples_and_gsm8k_rows_are_recognised():
    folder = Path(os.environ["SOD_SHARED_DATA"])
    for name, asks in (("live_code_bench_v1_3_plain", "```"), ("gsm8k_test", BOXED)):
        for line in (folder / f"{name}.jsonl").read_text().splitlines()[:5]:
            task = read_task(json.loads(line), "o")
            assert asks in task.messages[0]["content"]
            if name.startswith("live"):
                tests = CodeTests.parse(task.answer)
                # what the problem statement itself shows is public; the rest is not shown
                hidden = [i for i in tests.inputs[1:] if len(i) > 30]
                assert not any(i in task.messages[0]["content"] for i in hidden)
