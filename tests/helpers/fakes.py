"""An engine, a sandbox and a grader that follow a script and record what they are asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_sod.rollout.agent_loop import SampledTurn, Sampling


@dataclass(frozen=True)
class Result:
    """What a sandbox returns, as far as observations read it."""

    outcome: str = "ok"
    stdout: str = ""
    stderr: str = ""
    status: str = "finished"
    return_code: int | None = 0
    detail: str = ""
    timeout_s: float = 1.0


class FakeEngine:
    """Samples the scripted turns, one after another, for every trajectory it serves."""

    def __init__(self, turns: Iterable[list[int]], *, policy_version: int = 3):
        self._turns = list(turns)
        self.policy_version = policy_version
        self.asked: list[tuple[list[int], Sampling]] = []

    async def generate(self, token_ids: list[int], sampling: Sampling) -> SampledTurn:
        turn = self._turns[len(self.asked) % len(self._turns)][: sampling.max_tokens]
        self.asked.append((list(token_ids), sampling))
        logprobs = [-0.5 - 0.25 * place for place in range(len(turn))]
        return SampledTurn(list(turn), logprobs, [self.policy_version] * len(turn))


class FakeSandbox:
    """Answers with the scripted results; the last one is repeated."""

    def __init__(self, *results: Result):
        self._results = results or (Result(stdout="ok\n"),)
        self.programs: list[str] = []

    def run(self, code: str) -> Result:
        result = self._results[min(len(self.programs), len(self._results) - 1)]
        self.programs.append(code)
        return result


class FakeGrader:
    """Records what is graded; answers with a constant."""

    def __init__(self, reward: float = 1.0):
        self._reward = reward
        self.texts: list[str] = []

    async def __call__(self, prompt, text: str) -> float:
        self.texts.append(text)
        return self._reward
