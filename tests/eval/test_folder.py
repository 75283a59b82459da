"""Samples lost to infrastructure: neither an answer nor done.

Layer: pure, with scripted samples. Kills and other protocols: tests/eval/test_evaluation.py.
"""

import json

import pytest

from megatron_sod.data.tiny_models import STUDENT, write_tiny_model
from megatron_sod.errors import RolloutError
from megatron_sod.eval.folder import Folder
from megatron_sod.eval.tasks import eval_tasks
from tests.helpers.scripted_samples import NUM_SAMPLES, Sampler, eval_config, evaluate

ALL_LOST = {(prompt, n): "infra_error" for prompt in range(5) for n in range(NUM_SAMPLES)}
ANY_LOSS = "watchdog.max_infra_error_rate=1.0"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, **STUDENT)
    return str(folder)


def _lines(out) -> list[str]:
    return (out / "samples.jsonl").read_text().splitlines()


def test_an_outage_stops_the_evaluation_and_the_same_command_repairs_it(model, tmp_path):
    config = eval_config(model)
    with pytest.raises(RolloutError, match="15 of 15 trajectories") as caught:
        evaluate(config, tmp_path, Sampler(lost=ALL_LOST))
    said = str(caught.value)
    assert "watchdog.max_infra_error_rate 5%" in said and "tools/doctor.py" in said
    assert "the same command goes on" in said and "trained" not in said
    assert not (tmp_path / "report.json").exists()
    whole = evaluate(config, tmp_path / "other", Sampler())
    again = Sampler()
    report = evaluate(config, tmp_path, again)
    assert len(again.asked) == 5 and report["overall"] == whole["overall"]
    assert report["notes"] == []


def test_an_outage_in_the_middle_keeps_what_was_graded(model, tmp_path):
    config = eval_config(model, "eval.prompts_per_round=1")
    lost = {key: reason for key, reason in ALL_LOST.items() if key[0] == 2}
    first = Sampler(lost=lost)
    with pytest.raises(RolloutError, match="3 of 9 trajectories"):
        evaluate(config, tmp_path, first)
    assert len(first.asked) == 3  # no more was sampled
    again = Sampler()
    report = evaluate(config, tmp_path, again)
    assert [name for _, name in again.asked][0] == first.asked[2][1] and len(again.asked) == 3
    assert report["overall"]["num_graded"] == 15


@pytest.mark.parametrize("reason", ["infra_error", "time_limit"])
def test_a_group_with_a_lost_sample_is_not_done(model, tmp_path, reason):
    config = eval_config(model, ANY_LOSS)
    first = Sampler(lost={(1, 0): reason, (3, 2): reason})
    report = evaluate(config, tmp_path, first)
    assert report["overall"]["num_infra_errors"] == 2 and report["overall"]["num_graded"] == 13
    assert report["notes"][0].startswith("2 of 15 samples were lost to infrastructure")
    before = _lines(tmp_path)
    again = Sampler(lost={(0, 0): reason})  # the first group loses the same sample once more
    report = evaluate(config, tmp_path, again)
    assert [name for _, name in again.asked] == [first.asked[1][1], first.asked[3][1]]
    assert report["overall"]["num_infra_errors"] == 1 and report["overall"]["num_graded"] == 14
    third = Sampler()
    report = evaluate(config, tmp_path, third)
    assert len(third.asked) == 1 and report["notes"] == []
    assert report["overall"] == evaluate(config, tmp_path / "whole", Sampler())["overall"]
    # appended only, and no graded sample stands there twice
    after = _lines(tmp_path)
    assert after[: len(before)] == before
    graded = [json.loads(line) for line in after if json.loads(line)["is_valid"]]
    keys = [(r["seed"], r["prompt_id"], r["sample"]) for r in graded]
    assert len(keys) == 15 == len(set(keys))


def test_a_sample_that_is_lost_every_time_does_not_stop_what_remains(model, tmp_path):
    """1 of all 15 is within the bound; 1 of the 3 that are sampled again would not be."""
    config = eval_config(model, "watchdog.max_infra_error_rate=0.07")
    for _ in range(2):
        report = evaluate(config, tmp_path, Sampler(lost={(0, 1): "time_limit"}))
        assert report["overall"]["num_infra_errors"] == 1


def test_a_report_of_lost_samples_only_shows_no_rate(model, tmp_path):
    report = evaluate(eval_config(model, ANY_LOSS), tmp_path, Sampler(lost=ALL_LOST))
    assert report["overall"]["avg@3"] is None and report["overall"]["interval"] is None
    assert "%" not in report["table"][-1] and report["scalars"] == {}
    assert "15 of 15 samples were lost" in report["notes"][0]


def test_records_of_other_prompts_are_not_counted(model, tmp_path):
    config = eval_config(model)
    report = evaluate(config, tmp_path, Sampler())
    stranger = json.loads(_lines(tmp_path)[0]) | {"prompt_id": "another"}
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write(json.dumps(stranger) + "\n")
    assert evaluate(config, tmp_path, Sampler())["overall"] == report["overall"]
    assert Folder(tmp_path, config, eval_tasks(config)).num_graded == 15
