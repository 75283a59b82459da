"""One trajectory over a scripted engine, sandbox and grader; for the tests of the agent loop."""

import asyncio

from megatron_sod.data.chat import ChatFormat
from megatron_sod.data.tiny_world import tool_call_text
from megatron_sod.rollout.agent_loop import AgentLoop, Limits
from megatron_sod.rollout.tools import CodeInterpreter
from megatron_sod.types import Prompt, Trajectory
from tests.helpers.fakes import FakeEngine, FakeGrader, FakeSandbox
from tests.helpers.tokenizers import tiny_tokenizer

CHAT = ChatFormat(tiny_tokenizer(), tools=None)
PROMPT = Prompt("p:0", CHAT.prompt_ids([{"role": "user", "content": "1 + 1"}]), "2", "tiny_world")
ANSWER = "\\boxed{2}<|im_end|>"


def ids(text: str) -> list[int]:
    return CHAT.tokenizer(text, add_special_tokens=False)["input_ids"]


def call(code: str) -> str:
    return tool_call_text(code) + "<|im_end|>"


class Run:
    """A finished trajectory with everything its engine, sandbox and grader saw."""

    def __init__(self, turns, *results, reward=1.0, seed=7, top_p=1.0, retries=0, **limits):
        turns = [ids(turn) if isinstance(turn, str) else turn for turn in turns]
        self.engine, self.sandbox = FakeEngine(turns), FakeSandbox(*results)
        self.grader = FakeGrader(reward)
        tool = CodeInterpreter(self.sandbox, max_infra_retries=retries, max_concurrency=1)
        bounds = {
            "max_turns": 6,
            "max_response_length": 400,
            "max_observation_length": 60,
            "max_tool_calls_per_turn": 1,
        }
        loop = AgentLoop(CHAT, self.engine.generate, tool, self.grader, Limits(**bounds | limits))
        running = loop.run(PROMPT, "p:0/1/0", temperature=0.7, top_p=top_p, seed=seed)
        self.trajectory: Trajectory = asyncio.run(running)
        self.turns = turns

    @property
    def observation(self) -> str:
        t = self.trajectory
        pairs = zip(t.response_token_ids, t.loss_mask, strict=True)
        return CHAT.decode([token for token, mine in pairs if not mine])
