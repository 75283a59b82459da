"""A task is asked once, whatever names it has.

Layer: pure, over files in a temporary folder.
"""

import json
import os

import pytest

from megatron_sod.data.tiny_models import STUDENT, write_tiny_model
from megatron_sod.errors import DataError
from megatron_sod.eval.tasks import eval_tasks
from tests.helpers.scripted_samples import Sampler, eval_config, evaluate

ROWS = [{"prompt": f"{n}+{n}", "answer": str(2 * n), "data_source": "sums"} for n in range(1, 5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, **STUDENT)
    return str(folder)


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """`t.jsonl` of four tasks in the working directory."""
    monkeypatch.chdir(tmp_path)
    _write("t.jsonl", ROWS)
    return tmp_path


def _write(name, rows):
    with open(name, "w") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def test_the_same_file_under_another_path_is_the_same_evaluation(model, in_folder):
    out = in_folder / "out"
    first = evaluate(eval_config(model, data=["t.jsonl"]), out, Sampler())
    second = Sampler()
    again = evaluate(eval_config(model, data=["./t.jsonl"]), out, second)
    assert second.asked == []
    assert again["overall"] == first["overall"] and again["overall"]["num_prompts"] == 4
    assert (out / "samples.jsonl").read_text().count("\n") == 12


def test_a_file_given_twice_counts_once_and_is_said(model, in_folder):
    once = evaluate(eval_config(model, data=["t.jsonl"]), in_folder / "once", Sampler())
    os.link("t.jsonl", "copy.jsonl")
    config = eval_config(model, data=["t.jsonl", "t.jsonl", "copy.jsonl"])
    sampler = Sampler()
    twice = evaluate(config, in_folder / "twice", sampler)
    assert len(sampler.asked) == 4
    assert twice["overall"] == once["overall"] and twice["protocol_hash"] == once["protocol_hash"]
    assert (once["num_repeated_rows"], twice["num_repeated_rows"]) == (0, 8)
    assert once["notes"] == [] and twice["notes"] == [
        "8 rows are left out: each repeats an earlier one"
    ]


def test_rows_that_differ_in_anything_are_different_tasks(model, in_folder):
    others = [{**ROWS[0], "answer": "3"}, {**ROWS[0], "data_source": "other"}]
    _write("more.jsonl", [ROWS[0], *others, ROWS[0]])
    tasks = eval_tasks(eval_config(model, data=["more.jsonl"]))
    assert [p.answer for p in tasks.prompts] == ["2", "3", "2"] and tasks.num_repeated == 1
    assert [tasks.rows[p.prompt_id] for p in tasks.prompts] == [
        "more.jsonl:0", "more.jsonl:1", "more.jsonl:2"
    ]  # fmt: skip


def test_samples_say_which_row_they_answer(model, in_folder):
    evaluate(eval_config(model, data=["t.jsonl"]), in_folder / "out", Sampler())
    records = [json.loads(line) for line in (in_folder / "out/samples.jsonl").open()]
    assert [r["row"] for r in records] == [f"t.jsonl:{n // 3}" for n in range(12)]


def test_over_long_prompts_are_counted_in_the_report(model, in_folder):
    long = {"prompt": "1 + " * 40 + "1", "answer": "41"}
    _write("mixed.jsonl", [ROWS[0], long, ROWS[1], long])
    config = eval_config(model, "rollout.max_prompt_length=64", data=["mixed.jsonl"])
    report = evaluate(config, in_folder / "out", Sampler())
    assert report["num_prompts_too_long"] == 2 and report["overall"]["num_prompts"] == 2
    assert report["notes"] == [
        "2 prompts are left out: longer than rollout.max_prompt_length 64 tokens"
    ]
    assert json.loads((in_folder / "out/report.json").read_text())["num_prompts_too_long"] == 2


def test_nothing_but_over_long_prompts_is_an_error(model, in_folder):
    with pytest.raises(DataError, match="no usable prompt"):
        eval_tasks(eval_config(model, "rollout.max_prompt_length=2", data=["t.jsonl"]))
