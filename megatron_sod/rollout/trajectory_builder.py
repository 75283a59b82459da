"""Appends tokens to a trajectory. Step ids and masks are assigned here, when tokens arrive, and
nowhere else: no later stage searches text for turns."""

from __future__ import annotations

from megatron_sod.types import Prompt, Step, Trajectory


class TrajectoryBuilder:
    """A trajectory while it grows."""

    def __init__(self, prompt: Prompt, trajectory_id: str):
        self.prompt, self.trajectory_id = prompt, trajectory_id
        self.response: list[int] = []
        self._mask: list[bool] = []
        self._step_ids: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._steps: list[Step] = []
        self.last_turn: list[int] = []
        self.is_turn_open = False  # the latest turn was interrupted: what comes next belongs to it

    @classmethod
    def resumed(cls, prompt: Prompt, begun: Trajectory) -> TrajectoryBuilder:
        """The state an interrupted trajectory was left in."""
        builder = cls(prompt, begun.trajectory_id)
        builder.response = list(begun.response_token_ids)
        builder._mask, builder._step_ids = list(begun.loss_mask), list(begun.step_ids)
        builder._logprobs = list(begun.rollout_logprobs)
        builder._versions, builder._steps = list(begun.policy_versions), list(begun.steps)
        if begun.steps:
            start = begun.step_ids.index(begun.steps[-1].step_id)
            builder.last_turn = builder.response[start : start + begun.steps[-1].num_tokens]
        builder.is_turn_open = bool(begun.loss_mask) and begun.loss_mask[-1]
        return builder

    @property
    def token_ids(self) -> list[int]:
        """Everything the next turn is conditioned on."""
        return self.prompt.token_ids + self.response

    @property
    def num_turns(self) -> int:
        return len(self._steps)

    def add_turn(
        self, token_ids: list[int], logprobs: list[float], policy_versions: list[int]
    ) -> None:
        """Tokens the student sampled, and the weights' version at each: the next step, or the rest
        of one that was interrupted."""
        step = self.num_turns + (not self.is_turn_open)
        count = len(token_ids)
        assert len(logprobs) == len(policy_versions) == count, (
            f"{self.trajectory_id}: {len(logprobs)} logprobs and {len(policy_versions)} versions "
            f"for {count} sampled tokens"
        )
        self.response += token_ids
        self._mask += [True] * count
        self._step_ids += [step] * count
        self._logprobs += logprobs
        self._versions += policy_versions
        before = self.last_turn if self.is_turn_open else []
        self.last_turn = before + token_ids
        self._steps[step - 1 :] = [Step(step, "none", len(self.last_turn))]
        self.is_turn_open = False

    def set_outcome(self, outcome: str, num_tool_calls: int) -> None:
        """What the tool calls of the latest step gave, and how many of them were run."""
        step = self._steps[-1]
        self._steps[-1] = Step(step.step_id, outcome, step.num_tokens, num_tool_calls)

    def add_context(self, token_ids: list[int]) -> None:
        """Observations and template glue: read by the student, not written by it."""
        count = len(token_ids)
        self.response += token_ids
        self._mask += [False] * count
        self._step_ids += [0] * count
        self._logprobs += [0.0] * count
        self._versions += [-1] * count

    def finish(
        self, reason: str, score: float, *, temperature: float = 1.0, top_p: float = 1.0
    ) -> Trajectory:
        """`temperature`, `top_p`: what every turn was sampled at."""
        return Trajectory(
            trajectory_id=self.trajectory_id,
            prompt_id=self.prompt.prompt_id,
            prompt_token_ids=self.prompt.token_ids,
            response_token_ids=self.response,
            loss_mask=self._mask,
            step_ids=self._step_ids,
            rollout_logprobs=self._logprobs,
            policy_versions=self._versions,
            steps=tuple(self._steps),
            finish_reason=reason,
            reward=score,
            policy_version=max(self._versions, default=-1),
            score=score,
            temperature=temperature,
            top_p=top_p,
        )
