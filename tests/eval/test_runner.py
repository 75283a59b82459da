"""What an evaluation counts and what it leaves out.

Layer: pure; the controller is a list of graded trajectories. With a real engine: tests/end_to_end.
"""

from dataclasses import replace

import pytest

from megatron_sod.types import Prompt, Step
from tests.helpers.tiny import synthetic_trajectories
from tests.helpers.tokenizers import tiny_tokenizer

runner = pytest.importorskip("megatron_sod.eval.runner", reason="needs ray, which rollouts run on")


def _graded(*rewards):
    plain = synthetic_trajectories(len(rewards) + 1, 1, vocab_size=11, seed=2)[: len(rewards)]
    steps = (Step(1, "ok", 3, 1), Step(2, "none", 2, 0))
    return [
        replace(t, reward=r, steps=steps, finish_reason="answer")
        for t, r in zip(plain, rewards, strict=True)
    ]


def _summary(trajectories, num_prompts=4):
    return runner.summarise(trajectories, model="student", iteration=3, num_prompts=num_prompts)


def test_success_is_the_mean_reward_with_its_interval():
    result = _summary(_graded(1.0, 0.0, 1.0, 1.0))
    assert result.success == 0.75 and result.num_samples == 4
    # Wilson, 3 of 4: 0.3006 to 0.9544
    assert result.interval == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert result.tool_calls_per_trajectory == 1.0
    assert (result.model, result.iteration, result.num_prompts) == ("student", 3, 4)


def _of_prompts(*rewards_of_prompt):
    """Graded trajectories of several samples per prompt."""
    plain = _graded(*[r for rewards in rewards_of_prompt for r in rewards])
    names = [f"p:{n}" for n, rewards in enumerate(rewards_of_prompt) for _ in rewards]
    return [replace(t, prompt_id=name) for t, name in zip(plain, names, strict=True)]


def test_samples_of_one_prompt_are_not_independent():
    """12 prompts always solved and 48 never: 60 observations, however often they are repeated."""
    trajectories = _of_prompts(*[[float(n < 12)] * 4 for n in range(60)])
    result = _summary(trajectories, num_prompts=60)
    low, high = result.interval
    assert result.success == pytest.approx(0.2) and result.num_samples == 240
    # a binomial's 2.5 % and 97.5 % points over 60 prompts: 6 and 18; over 240 samples: 36 and 60
    assert low == pytest.approx(6 / 60, abs=0.02) and high == pytest.approx(18 / 60, abs=0.02)
    fewer = _summary(_of_prompts(*[[float(n < 12)] * 2 for n in range(60)]))
    assert result.interval == fewer.interval


def test_prompts_solved_half_the_time_spread_less_than_prompts_solved_or_not():
    """30 prompts solved in 1 of 4 samples, 30 in 3: standard error 0.25 / sqrt(60) = 0.032."""
    means = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]] * 30
    low, high = _summary(_of_prompts(*means), num_prompts=60).interval
    assert low == pytest.approx(0.5 - 0.063, abs=0.01)
    assert high == pytest.approx(0.5 + 0.063, abs=0.01)


def test_every_prompt_counts_the_same_whatever_was_lost_of_it():
    trajectories = _of_prompts([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    lost = {"finish_reason": "infra_error", "reward": float("nan")}
    trajectories[3:5] = [replace(t, **lost) for t in trajectories[3:5]]
    assert _summary(trajectories).success == 0.5


def test_lost_trajectories_are_left_out_and_counted():
    trajectories = _graded(1.0, 0.0, 1.0)
    trajectories[1] = replace(trajectories[1], finish_reason="infra_error", reward=float("nan"))
    result = _summary(trajectories)
    assert (result.success, result.num_samples, result.num_infra_errors) == (1.0, 2, 1)
    assert result.finish_reasons == {"answer": 2, "infra_error": 1}


def test_penalties_and_bonuses_do_not_leave_the_range_of_a_rate():
    assert _summary(_graded(-0.6, 1.5)).success == 0.5


def test_nothing_graded_is_no_measurement():
    result = _summary([])
    assert (result.success, result.interval, result.num_samples) == (None, None, 0)
    assert result.problem == "none of 0 trajectories was graded"


def test_a_result_is_plain_data():
    row = _summary(_graded(1.0)).as_dict()
    assert row["success"] == 1.0 and isinstance(row["finish_reasons"], dict)


def test_an_evaluation_samples_as_configured():
    from tests.helpers.tiny import sod_config

    asked = {}

    class Controller:
        def rollout(self, prompts, **options):
            asked.update(options, prompts=prompts)
            return _graded(1.0, 0.0)

    config = sod_config("s", "t", eval={"num_samples": 2, "temperature": 0.8, "top_p": 0.6})
    prompts = [_prompt("p:0", "tiny_world")]
    result = runner.evaluate(
        Controller(), prompts, config, tiny_tokenizer(), model="teacher", iteration=0
    )
    assert asked == {
        "prompts": prompts,
        "tag": "eval-teacher-0",
        "num_generations": 2,
        "temperature": 0.8,
        "top_p": 0.6,
    }
    assert (result.model, result.num_prompts, result.num_samples) == ("teacher", 1, 2)


def _prompt(prompt_id, source):
    return Prompt(prompt_id, [1, 2], "7", source)


def _answer(text, score):
    ids = tiny_tokenizer()(f"\\boxed{{{text}}}<|im_end|>")["input_ids"]
    (plain,) = _graded(score)
    return replace(plain, response_token_ids=ids, step_ids=[1] * len(ids),
                   loss_mask=[True] * len(ids), steps=(Step(1, "none", len(ids)),))  # fmt: skip


def test_each_source_of_a_mixed_benchmark_is_reported_for_itself():
    from tests.helpers.tiny import sod_config

    answers = [("7", 1.0), ("3", 0.0), ("7", 1.0)], [("1", 0.0), ("1", 0.0), ("7", 1.0)]
    prompts = [_prompt("a:0", "aime2024"), _prompt("g:0", "gpqa"), _prompt("a:1", "aime2024")]

    class Controller:
        def rollout(self, prompts, **options):
            chosen = (answers[0], answers[1], answers[1])
            return [_answer(*answer) for group in chosen for answer in group]

    config = sod_config("s", "t", eval={"num_samples": 3})
    result = runner.evaluate(
        Controller(), prompts, config, tiny_tokenizer(), model="student", iteration=3
    )
    aime, gpqa = result.sources["aime2024"], result.sources["gpqa"]
    assert result.success == pytest.approx(4 / 9)
    assert (aime["num_prompts"], aime["avg@3"]) == (2, pytest.approx(0.5))
    assert (gpqa["num_prompts"], gpqa["avg@3"]) == (1, pytest.approx(1 / 3))
    assert aime["pass"]["3"] == gpqa["pass"]["3"] == 1.0
    # votes: 7 7 3 is right, 1 1 7 is wrong
    assert (aime["maj"]["3"], gpqa["maj"]["3"]) == (0.5, 0.0)
