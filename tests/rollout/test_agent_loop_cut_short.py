"""Trajectories cut short: by new weights or a stop they go on, by the clock they teach nothing.

Layer: pure, with the tiny tokenizer. Whole trajectories: test_agent_loop.py.
"""

import asyncio
import math

import pytest

from megatron_sod.errors import RolloutError
from megatron_sod.rollout.agent_loop import AgentLoop, Limits, SampledTurn, Sampling
from megatron_sod.rollout.tools import CodeInterpreter, Observation
from tests.helpers.fakes import FakeEngine, FakeGrader, FakeSandbox, Result
from tests.rollout.one_run import ANSWER, CHAT, PROMPT, Run, call, ids


class Interruptible:
    """Samples scripted turns by place in the conversation; each of the first tries stops after so
    many tokens of what it is asked for."""

    def __init__(self, turns, stops):
        self._turns, self._stops = [ids(turn) for turn in turns], list(stops)
        self.asked: list[Sampling] = []
        self.version = 1

    async def generate(self, token_ids, sampling):
        self.asked.append(sampling)
        response = token_ids[len(PROMPT.token_ids) :]
        number = response.count(CHAT.end_of_turn_id) // 2  # a turn's and its observation's
        last = max((i for i, t in enumerate(response) if t == CHAT.end_of_turn_id), default=-1)
        begun = 0
        if number:
            begun = len(response) - (last + 1) - len(_after_last_end())
        else:
            begun = len(response)
        left = self._turns[number][begun:]
        is_cut = bool(self._stops)
        sampled = left[: self._stops.pop(0)] if is_cut else left
        logprobs = [-0.1 * (begun + i) for i in range(len(sampled))]
        return SampledTurn(sampled, logprobs, [self.version] * len(sampled), is_cut)


def _after_last_end() -> list[int]:
    ids = CHAT.observation_ids(["2"])
    return ids[len(ids) - ids[::-1].index(CHAT.end_of_turn_id) :]


@pytest.mark.parametrize("stops", [[0], [3], [3, 2], [4, 0, 1], [3, 1, 1, 1, 1, 1]])
def test_an_interrupted_trajectory_goes_on_where_it_was_with_the_newer_weights(stops):
    turns = [call("print(1+1)"), ANSWER]
    engine = Interruptible(turns, stops)
    tool = CodeInterpreter(FakeSandbox(Result(stdout="2\n")), max_infra_retries=0)
    limits = Limits(6, 400, 60, 1)
    loop = AgentLoop(CHAT, engine.generate, tool, FakeGrader(1.0), limits)
    options = {"temperature": 1.0, "top_p": 1.0, "seed": 7}
    trajectory = None
    for version in range(1, len(stops) + 2):
        engine.version = version
        running = loop.run(PROMPT, "p:0/1/0", **options, begun=trajectory)
        trajectory = asyncio.run(running)
        is_last = version == len(stops) + 1
        assert trajectory.finish_reason == ("answer" if is_last else "interrupted")
        assert math.isnan(trajectory.reward) != is_last
    whole = Run(turns, Result(stdout="2\n")).trajectory
    for name in ("response_token_ids", "loss_mask", "step_ids", "steps", "finish_reason", "reward"):
        assert getattr(trajectory, name) == getattr(whole, name), name
    expected = [v for v, cut in enumerate(stops, start=1) for _ in range(cut)]
    versions = [v for v in trajectory.policy_versions if v >= 0]
    assert versions[: len(expected)] == expected and versions[-1] == len(stops) + 1
    places = {sampling.max_tokens for sampling in engine.asked}  # one per place asked from
    assert len({sampling.seed for sampling in engine.asked}) == len(places)


def test_told_to_stop_it_ends_between_two_turns_and_can_go_on():
    engine = FakeEngine([ids(call("print(1)")), ids(ANSWER)])
    tool = CodeInterpreter(FakeSandbox(), max_infra_retries=0)
    stop_after = [False, True]
    loop = AgentLoop(
        CHAT,
        engine.generate,
        tool,
        FakeGrader(1.0),
        Limits(6, 400, 60, 1),
        is_stopping=lambda: stop_after.pop(0) if stop_after else False,
    )
    options = {"temperature": 0.7, "top_p": 1.0, "seed": 7}
    begun = asyncio.run(loop.run(PROMPT, "p:0/1/0", **options))
    assert begun.finish_reason == "interrupted" and len(engine.asked) == 1
    assert not begun.loss_mask[-1], "the observation is there, the next turn is not begun"
    finished = asyncio.run(loop.run(PROMPT, "p:0/1/0", **options, begun=begun))
    assert finished == Run([call("print(1)"), ANSWER]).trajectory
    assert (finished.temperature, finished.top_p) == (0.7, 1.0)
    with pytest.raises(RolloutError, match="sampled at temperature 0.7 .* expected 1.0"):
        asyncio.run(loop.run(PROMPT, "p:0/1/0", **options | {"temperature": 1.0}, begun=begun))


@pytest.mark.parametrize("slow", ["engine", "sandbox"])
def test_the_time_limit_ends_it_with_a_reason_of_its_own_and_it_teaches_nothing(slow):
    engine = FakeEngine([ids(call("print(1)")), ids(ANSWER)])

    async def generate(token_ids, sampling):
        if slow == "engine" and engine.asked:
            await asyncio.sleep(30)
        return await engine.generate(token_ids, sampling)

    class Tool:
        async def call(self, call, *, call_id):
            if slow == "sandbox":
                await asyncio.sleep(30)
            return Observation("1", "ok")

    limits = Limits(6, 400, 60, 1, timeout_s=0.05)
    loop = AgentLoop(CHAT, generate, Tool(), FakeGrader(1.0), limits)
    t = asyncio.run(loop.run(PROMPT, "p:0/1/0", temperature=1.0, top_p=1.0, seed=7))
    assert t.finish_reason == "time_limit" and not t.is_valid and math.isnan(t.reward)
    assert len(t.steps) == 1, "what was there before the limit is kept for the log"


def test_a_timeout_that_is_not_the_limit_is_not_mistaken_for_it():
    async def generate(token_ids, sampling):
        raise TimeoutError("of the engine's own")

    loop = AgentLoop(CHAT, generate, None, FakeGrader(1.0), Limits(6, 400, 60, 1, timeout_s=30))
    with pytest.raises(TimeoutError, match="of the engine's own"):
        asyncio.run(loop.run(PROMPT, "p:0/1/0", temperature=1.0, top_p=1.0, seed=7))
