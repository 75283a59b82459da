"""What flows through one iteration. Frozen; shapes and one worked example per field.

    Prompt -> Trajectory -> MicroBatch -> TokenScores -> TokenCredit -> update

S response tokens, T packed tokens, R rows that carry loss, K steps, N trajectories of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Prompt:
    """One task, rendered."""

    prompt_id: str  # stable across epochs: "tiny_world:train:17"
    token_ids: list[int]  # ends with the assistant marker, ready to be continued
    answer: str  # "499"
    data_source: str  # "tiny_world", "gsm8k", ...
    messages: list[dict] = field(default_factory=list)
    hint: str = ""  # for a privileged teacher only: "2 comes before 3"


@dataclass(frozen=True)
class Step:
    """One assistant turn and what its tool call gave."""

    step_id: int  # 1..K
    outcome: str  # ok | user_error | timeout | memory | output_limit | infra_error | rejected
    #               | malformed (a call that does not parse) | none (no call)
    num_tokens: int  # tokens the student wrote in this turn: 26
    num_tool_calls: int = 0  # that were run: not malformed, not refused


LOST = ("infra_error", "time_limit")  # finish reasons that leave every statistic and every loss


@dataclass(frozen=True)
class Trajectory:
    """One rollout: token ids as sampled, never re-tokenised."""

    trajectory_id: str  # prompt_id, iteration and sample: "tiny_world:train:17/3/5"
    prompt_id: str  # the group its reward is compared in
    prompt_token_ids: list[int]
    response_token_ids: list[int]  # [S] sampled ids, observations and template glue
    loss_mask: list[bool]  # [S] True on tokens the student wrote
    step_ids: list[int]  # [S] 0 outside the student's tokens, else the turn 1..K: 1 1 1 0 0 2 2
    rollout_logprobs: list[float]  # [S] engine logprob after temperature, 0.0 where mask is False
    policy_versions: list[int]  # [S] version of the engine's weights, -1 where mask is False
    steps: tuple[Step, ...]
    # answer | max_turns | max_length | unanswered_call (the text was ended after a tool call)
    # | time_limit | infra_error; interrupted: to be continued
    finish_reason: str
    reward: float  # 1.0 right, 0.0 wrong; NaN when not graded
    policy_version: int  # the newest version that wrote a token
    score: float = float("nan")  # as graded, in [0, 1]; `reward` may be shaped from it
    temperature: float = 1.0  # it was sampled at; both models are scored at the same
    top_p: float = 1.0  # below 1 the student's distribution is not what was sampled from

    @property
    def is_valid(self) -> bool:
        """False for trajectories that infrastructure spoilt, or cut by the clock, which measures
        the machine and not the student: they teach nothing."""
        return self.finish_reason not in LOST and any(self.loss_mask)

    @property
    def is_mixed_version(self) -> bool:
        """Whether weights changed while it was being written."""
        return len(set(self.policy_versions) - {-1}) > 1

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.response_token_ids)


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences of one forward pass.

    Row r predicts token r + 1 of its sequence; only rows whose target the student wrote are
    listed in `rows`, so the heads never see the others.
    """

    token_ids: torch.Tensor  # [1, T] int64
    position_ids: torch.Tensor  # [1, T] int64, restarts at 0 in each sequence
    cu_seqlens: torch.Tensor  # [sequences + 1] int32: 0 97 201
    max_seqlen: int
    rows: torch.Tensor  # [R] int64 into T
    targets: torch.Tensor  # [R] int64, the token after each row
    step_ids: torch.Tensor  # [R] int64, 1..K
    trajectory_ids: torch.Tensor  # [R] int64, index into this rank's trajectories
    rollout_logprobs: torch.Tensor  # [R] float32
    # [R] int64, on a context-parallel rank: which rows of the whole micro-batch it holds; None: all
    places: torch.Tensor | None = None

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a value that the whole micro-batch has one of per row."""
        return whole if self.places is None else whole[self.places.to(whole.device)]


@dataclass(frozen=True)
class MiniBatch:
    """What one optimizer step trains on, on this data-parallel rank."""

    micro_batches: list[MicroBatch]
    # What the teacher reads when its prompts differ from the student's: the same responses in the
    # same order, so that rows agree one to one. None: the teacher reads `micro_batches`.
    teacher_micro_batches: list[MicroBatch] | None = None


@dataclass(frozen=True)
class TrainingBatch:
    """One iteration's rollouts, cut for this data-parallel rank."""

    mini_batches: list[MiniBatch]
    trajectories: list[Trajectory]  # this rank's, in the order trajectory_ids count them
    group_advantages: torch.Tensor  # [N] float32, over the whole group of each prompt
    is_taught: torch.Tensor | None = None  # [N] bool, False: no privileged prompt; None: all are
    num_nonfinite: int = 0  # trajectories left out because a score was not a finite number


@dataclass(frozen=True)
class TokenScores:
    """What student and teacher say about one micro-batch; on the last pipeline stage only.

    Every context-parallel rank holds all R rows.
    """

    student_logprobs: torch.Tensor  # [R] float32, nats, of the sampled token
    student_entropy: torch.Tensor  # [R] nats
    teacher_logprobs: torch.Tensor | None  # [R]; None without a teacher
    teacher_entropy: torch.Tensor | None  # [R]
    reverse_kl: torch.Tensor | None  # [R] KL(student || teacher), exact over the vocabulary
    # [R, H_teacher] in host memory; kept when the loss needs its logits
    teacher_hidden: torch.Tensor | None


@dataclass(frozen=True)
class TokenCredit:
    """What the loss multiplies each row by."""

    old_logprobs: torch.Tensor  # [R] float32, behaviour policy of the ratio
    advantages: torch.Tensor  # [R] GRPO part, plus the distillation part in sampled_advantage
    distill_weights: torch.Tensor  # [R] coefficient of the separate distillation term, >= 0
    log_ratios: torch.Tensor  # [R] teacher - student, clipped; 0 without a teacher
    importance: torch.Tensor  # [R] pi / mu capped: student now over the engine that sampled; or 1


@dataclass(frozen=True)
class StepCredit:
    """Per-step divergence and weight of this rank's trajectories."""

    step_divergence: torch.Tensor  # [N, K] float32, nats
    step_weights: torch.Tensor  # [N, K] float32; 0 where not valid
    valid: torch.Tensor  # [N, K] bool
