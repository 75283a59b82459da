"""Which samples vote for the same answer.

Layers: pure, with a comparison of our own; then the grader's, which asks a helper process. The
arithmetic of a vote: tests/eval/test_metrics.py.
"""

import time

import pytest

from megatron_sod.errors import GraderUnavailable
from megatron_sod.eval import votes
from megatron_sod.eval.report import summarise_samples
from megatron_sod.eval.samples import sample_record
from megatron_sod.rollout import rewards
from megatron_sod.types import Prompt, Step, Trajectory
from tests.helpers.tokenizers import tiny_tokenizer


def _records(answer: str, boxed: list[str], prompt_id: str = "p:0") -> list[dict]:
    """Records of samples that answered so, graded as a run would."""
    prompt = Prompt(prompt_id, [1], answer, "bench")
    records = []
    for number, content in enumerate(boxed):
        ids = tiny_tokenizer()(f"\\boxed{{{content}}}<|im_end|>")["input_ids"]
        trajectory = Trajectory(
            trajectory_id=f"{prompt_id}/{number}",
            prompt_id=prompt_id,
            prompt_token_ids=[1],
            response_token_ids=ids,
            loss_mask=[True] * len(ids),
            step_ids=[1] * len(ids),
            rollout_logprobs=[0.0] * len(ids),
            policy_versions=[0] * len(ids),
            steps=(Step(1, "none", len(ids)),),
            finish_reason="answer",
            reward=rewards.grade_auto(prompt, f"\\boxed{{{content}}}"),
            policy_version=0,
        )
        records.append(sample_record(prompt, trajectory, tiny_tokenizer(), seed=0, sample=number))
    return records


def test_a_choice_is_one_vote_however_it_is_dressed():
    records = _records("A", ["A", "A", "A", "C", "C", "\\text{C}", "\\text{C}", "(C)"])
    assert [r["prediction"] for r in records] == ["A"] * 3 + ["C"] * 5
    numbers = summarise_samples(records, num_samples=8)["overall"]
    assert numbers["maj"]["8"] == 0.0 and numbers["avg@8"] == 3 / 8


def test_a_box_without_one_letter_is_an_answer_of_its_own():
    records = _records("A", ["A or B", "", "B) ice"])
    assert [r["prediction"] for r in records] == ["AorB", "", "B"]


def test_a_wrong_value_is_one_vote_however_it_is_spelled():
    boxed = ["7", "7.0", "0.5", "\\frac{1}{2}", "\\dfrac12", "3", "10\\text{ in}"]
    numbers = summarise_samples(_records("7", boxed), num_samples=7)["overall"]
    assert numbers["maj"]["7"] == 0.0  # two right votes, three for a half
    assert numbers["num_spelling_votes"] == 0


def _same_parity(first: str, second: str) -> bool:
    return int(first) % 2 == int(second) % 2


def _records_of(predictions: list[str], prompt_id: str = "p:0", right: int = 0) -> list[dict]:
    return [
        {"prompt_id": prompt_id, "seed": 0, "prediction": text, "score": float(number < right)}
        for number, text in enumerate(predictions)
    ]


def test_votes_are_counted_by_the_comparison_of_the_grader():
    box = votes.BallotBox(_same_parity)
    found = box.count(_records_of(["9", "2", "3", "4", "6", "2", "", "5"], right=1))
    assert found == votes.Votes(num_correct=1, wrong=(2, 4), num_empty=1)
    assert box.num_by_spelling == 0


def test_programs_do_not_vote():
    assert votes.BallotBox(_same_parity).count(_records_of(["1", None])) is None


def test_counting_ends_in_time_and_says_what_it_told_apart_by_spelling():
    def slow(first: str, second: str) -> bool:
        time.sleep(0.05)
        return True

    box = votes.BallotBox(slow, prompt_limit_s=0.2, limit_s=0.5)
    started = time.monotonic()
    found = [box.count(_records_of([str(i) for i in range(32)], f"p:{n}")) for n in range(2000)]
    assert time.monotonic() - started < 3.0
    assert all(sum(f.wrong) == 32 for f in found)
    assert found[0].wrong[-1] > 1 and found[-1].wrong == (1,) * 32
    assert box.num_by_spelling == 2000


def test_a_comparison_that_cannot_be_made_is_made_by_spelling():
    def lost(first: str, second: str) -> bool:
        raise GraderUnavailable("killed twice")

    box = votes.BallotBox(lost)
    assert box.count(_records_of(["1", "2", "2"])).wrong == (1, 2)
    assert box.num_by_spelling == 1


def test_plain_numbers_and_letters_are_told_apart_without_the_helper(monkeypatch):
    monkeypatch.setattr(rewards._MATH, "equal", lambda *_: pytest.fail("asked the helper"))
    box = votes.BallotBox(rewards.same_answer)
    started = time.monotonic()
    for number in range(300):  # prompts, every sample another answer
        texts = [str(900 * number + i) for i in range(28)]
        found = box.count(_records_of([*texts, "A", "B", "C", "-1"], f"p:{number}"))
        assert found.wrong == (1,) * 32
    assert time.monotonic() - started < 15 and box.num_by_spelling == 0
