"""The numbers of an evaluation, against tables small enough to enumerate.

Layer: pure. Single metrics: tests/eval/test_metrics.py; sampling and resuming:
tests/eval/test_evaluation.py.
"""

import itertools

import pytest

from megatron_sod.eval.report import summarise_samples, table_lines
from megatron_sod.observe.reference_names import validation_scalars


def _record(prompt, score, prediction="1", *, seed=0, source="math", valid=True, **more):
    row = {
        "prompt_id": prompt,
        "data_source": source,
        "seed": seed,
        "sample": 0,
        "is_valid": valid,
        "score": score if valid else None,
        "prediction": prediction,
        "finish_reason": "answer" if valid else "infra_error",
        "num_turns": 2,
        "num_tool_calls": 1,
        "outcomes": ["ok"],
        "response_tokens": 10,
        "student_tokens": 6,
        "final_text": "",
    }
    return {**row, **more}


# prompt a: right right wrong(7) ; prompt b: wrong(5) wrong(5) right ; prompt c: empty empty wrong
TABLE = {
    "a": [(1.0, "3"), (1.0, "3.0"), (0.0, "7")],
    "b": [(0.0, "5"), (0.0, "5"), (1.0, "4")],
    "c": [(0.0, ""), (0.0, ""), (0.0, "9")],
}
RECORDS = [_record(p, score, text) for p, rows in TABLE.items() for score, text in rows]


def test_rates_equal_enumeration():
    numbers = summarise_samples(RECORDS, num_samples=3)["overall"]
    assert numbers["avg@3"] == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    for k in (1, 2, 3):
        passed, won = [], []
        for rows in TABLE.values():
            subsets = list(itertools.combinations(rows, k))
            passed.append(sum(any(s for s, _ in chosen) for chosen in subsets) / len(subsets))
            won.append(sum(_vote(chosen) for chosen in subsets) / len(subsets))
        assert numbers["pass"][str(k)] == pytest.approx(sum(passed) / 3)
        assert numbers["maj"][str(k)] == pytest.approx(sum(won) / 3)
    assert list(numbers["pass"]) == ["1", "2", "3"]


def _vote(chosen) -> float:
    votes: dict = {}
    for score, text in chosen:
        if text:
            key = "right" if score else text  # 3 and 3.0 are one answer
            votes[key] = votes.get(key, 0) + 1
    winners = [key for key, n in votes.items() if n == max(votes.values())]
    return winners.count("right") / len(winners) if winners else 0.0


def test_lost_samples_are_left_out_and_counted():
    records = [_record("a", 1.0), _record("a", 0.0, valid=False), _record("b", 0.0)]
    numbers = summarise_samples(records, num_samples=2)["overall"]
    assert numbers["avg@2"] == 0.5 and numbers["num_infra_errors"] == 1
    assert (numbers["num_prompts"], numbers["num_graded"]) == (2, 2)
    assert numbers["pass"]["2"] is None  # no prompt has two graded samples


def test_a_prompt_without_any_graded_sample_is_counted_but_not_averaged():
    records = [_record("a", 1.0), _record("b", 0.0, valid=False)]
    numbers = summarise_samples(records, num_samples=1)["overall"]
    assert numbers["avg@1"] == 1.0 and numbers["num_prompts"] == 2


def test_a_report_over_nothing_has_no_number_and_no_interval():
    """A rate of 0 and an interval of everything would read as a measurement."""
    records = [_record("a", 0.0, valid=False), _record("b", 0.0, valid=False)]
    report = summarise_samples(records, num_samples=2)
    numbers = report["overall"]
    assert numbers["avg@2"] is None and numbers["interval"] is None
    line = table_lines({**report, "protocol": {"num_samples": 2}})[-1]
    assert [cell.strip() for cell in line.split("|")][1:-1] == ["math", "2", *["-"] * 7, "2"]
    assert validation_scalars(report["sources"]) == {}


def test_seeds_are_repeated_measurements_of_the_same_prompts():
    records = [_record("a", 1.0, seed=0), _record("a", 0.0, seed=1), _record("b", 1.0, seed=0),
               _record("b", 1.0, seed=1)]  # fmt: skip
    numbers = summarise_samples(records, num_samples=1)["overall"]
    assert numbers["per_seed"] == [1.0, 0.5] and numbers["avg@1"] == 0.75
    assert numbers["seed_std"] == pytest.approx(0.353553, abs=1e-6)
    assert numbers["num_prompts"] == 2


def test_programs_do_not_vote():
    numbers = summarise_samples([_record("a", 1.0, None)], num_samples=1)["overall"]
    assert numbers["maj"]["1"] is None and numbers["pass"]["1"] == 1.0


def test_a_share_of_passed_tests_is_averaged_but_is_no_pass():
    numbers = summarise_samples([_record("a", 0.5, None)], num_samples=1)["overall"]
    assert numbers["avg@1"] == 0.5 and numbers["pass"]["1"] == 0.0


def test_sources_are_reported_apart_and_behaviour_is_counted():
    records = [
        _record("a", 1.0, source="aime", outcomes=["ok", "user_error"], num_tool_calls=2),
        _record("b", 0.0, "", source="gpqa", outcomes=[], num_tool_calls=0,
                finish_reason="max_length"),
    ]  # fmt: skip
    report = summarise_samples(records, num_samples=1)
    assert list(report["sources"]) == ["aime", "gpqa"]
    assert report["sources"]["aime"]["tool_outcomes"] == {"ok": 0.5, "user_error": 0.5}
    assert report["sources"]["gpqa"]["truncated_rate"] == 1.0
    overall = report["overall"]
    assert (overall["tool_calls"], overall["tool_use_rate"]) == (1.0, 0.5)
    assert overall["no_answer_rate"] == 0.5 and overall["student_tokens"] == 6
    lines = table_lines({**report, "protocol": {"num_samples": 1}})
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert lines[0].startswith("| data") and lines[-1].startswith("| all")
