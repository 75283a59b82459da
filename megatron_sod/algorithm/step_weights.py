"""Trust in the teacher at each step of a trajectory. One small function per policy.

B trajectories, K steps. Every policy is a pure function of the step divergences (and, where it
says so, of the tools' outcomes); none carries a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_sod.algorithm.steps import quantile_over_ranks


@dataclass(frozen=True)
class StepWeightInputs:
    """What a policy may read. All tensors are float64 or bool, so that ratios keep their digits.

    d_BK: [B, K] step divergence, nats, >= 0, 0 where not valid; e.g. [[.3, .6, .9]].
    valid_BK: [B, K] bool; e.g. [[True, True, False]] for a trajectory of two steps.
    anchor_B1: [B, 1] divergence of the first valid step (d_1), after the floor.
    wrong_BK: [B, K] bool, the step's tool outcome is neither ok nor infra_error; None if unknown.
    delta, epsilon: as in `step_weights`.
    """

    d_BK: torch.Tensor
    valid_BK: torch.Tensor
    anchor_B1: torch.Tensor
    wrong_BK: torch.Tensor | None
    delta: float
    epsilon: float


Policy = Callable[[StepWeightInputs], torch.Tensor]


@dataclass(frozen=True)
class _Entry:
    compute: Policy
    needs: frozenset[str]


STEP_WEIGHTS: dict[str, _Entry] = {}


def register_step_weight(name: str, *, needs: tuple[str, ...] = ()) -> Callable[[Policy], Policy]:
    """Make `fn(StepWeightInputs) -> w_BK` selectable as `distill.step_weight.policy: name`.

    Args:
        needs: optional inputs the policy cannot work without; known: "wrong_BK".
    Raises:
        ValueError: the name is taken, or an input is unknown.
    """
    unknown = set(needs) - {"wrong_BK"}
    if unknown:
        raise ValueError(f"step weight {name!r} needs {sorted(unknown)}; known: ['wrong_BK']")
    if name in STEP_WEIGHTS:
        raise ValueError(f"step weight {name!r} is already registered; choose another name")

    def add(fn: Policy) -> Policy:
        STEP_WEIGHTS[name] = _Entry(fn, frozenset(needs))
        return fn

    return add


def step_weights(
    d_BK: torch.Tensor,
    valid_BK: torch.Tensor,
    *,
    delta: float = 0.2,
    epsilon: float = 1e-6,
    policy: str = "sod",
    wrong_BK: torch.Tensor | None = None,
    d_floor: float | None = None,
    w_min: float | None = None,
    anchor_floor: float | None = None,
) -> torch.Tensor:
    """Trust in the teacher at each step, from how far the student has drifted since step 1.

    sod: w_k = min((d_1 + epsilon) / (d_k + epsilon), 1 + delta), the paper's product telescoped.

    Args:
        d_BK: [B, K] float, nats per token, >= 0.
        valid_BK: [B, K] bool, False on padding and on empty steps; these weigh 0, keep their
            number, and the first valid step is the anchor d_1.
        delta: >= 0 (may be inf); how far above 1 a recovered step may rise (reference: 0.2).
        epsilon: > 0; keeps the ratio finite where a step agrees with the teacher exactly.
        policy: a name in STEP_WEIGHTS.
        wrong_BK: [B, K] bool, True where the step's tool outcome is neither ok nor infra_error.
        d_floor: raise d_1 to this quantile of the valid divergences in d_BK (None: off), so that
            a chance agreement in step 1 does not silence the rest of the trajectory.
        anchor_floor: the same floor in nats, for callers that know the quantile over all ranks.
        w_min: lower bound on valid steps' weights (None: off).
    Returns:
        [B, K] in d_BK's dtype; 0 on steps that are not valid. No gradient flows through it.
    Raises:
        ValueError: shapes differ, an option is out of range, or the policy lacks its input.
    Distributed: no communication; every rank that passes the same d gets the same weights.
    Source: arXiv 2605.07725 Eq. 7; equality with the product form is tested.
    """
    entry = _checked_entry(policy, d_BK, valid_BK, wrong_BK, delta, epsilon, d_floor, w_min)
    valid_BK = valid_BK.bool()
    d64_BK = torch.where(valid_BK, d_BK.detach().double(), 0.0)
    if anchor_floor is None and d_floor is not None:
        anchor_floor = quantile_over_ranks(d64_BK[valid_BK], d_floor)
    inputs = StepWeightInputs(
        d_BK=d64_BK,
        valid_BK=valid_BK,
        anchor_B1=_anchor(d64_BK, valid_BK, anchor_floor),
        wrong_BK=None if wrong_BK is None else wrong_BK.bool(),
        delta=delta,
        epsilon=epsilon,
    )
    w_BK = entry.compute(inputs)
    if w_min is not None:
        w_BK = w_BK.clamp_min(w_min)
    return torch.where(valid_BK, w_BK, 0.0).to(d_BK.dtype)


def _checked_entry(policy, d_BK, valid_BK, wrong_BK, delta, epsilon, d_floor, w_min) -> _Entry:
    if policy not in STEP_WEIGHTS:
        raise ValueError(f"step weight policy {policy!r} is unknown; known: {sorted(STEP_WEIGHTS)}")
    if d_BK.shape != valid_BK.shape or (wrong_BK is not None and wrong_BK.shape != d_BK.shape):
        raise ValueError(
            "step divergence, valid and wrong must have one shape; got "
            f"{tuple(d_BK.shape)}, {tuple(valid_BK.shape)} and "
            f"{None if wrong_BK is None else tuple(wrong_BK.shape)}"
        )
    entry = STEP_WEIGHTS[policy]
    if "wrong_BK" in entry.needs and wrong_BK is None:
        raise ValueError(
            f"step weight policy {policy!r} needs the tool outcome of each step; pass wrong_BK"
        )
    if not delta >= 0:
        raise ValueError(f"delta must be >= 0; got {delta}")
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon must be > 0 and finite; got {epsilon}")
    if d_floor is not None and not 0 <= d_floor <= 1:
        raise ValueError(f"d_floor is a quantile and must lie in 0..1; got {d_floor}")
    if w_min is not None and not 0 <= w_min <= 1 + delta:
        raise ValueError(f"w_min must lie in 0..1 + delta; got {w_min}")
    return entry


def _anchor(d_BK: torch.Tensor, valid_BK: torch.Tensor, floor: float | None) -> torch.Tensor:
    if d_BK.shape[1] == 0:
        return d_BK.new_zeros(d_BK.shape[0], 1)
    first_B1 = valid_BK.int().argmax(dim=1, keepdim=True)
    anchor_B1 = d_BK.gather(1, first_B1)
    return anchor_B1 if floor is None else anchor_B1.clamp_min(floor)


def _is_first(valid_BK: torch.Tensor) -> torch.Tensor:
    return valid_BK & (valid_BK.long().cumsum(dim=1) == 1)


def _steps_after_first_error(x: StepWeightInputs) -> torch.Tensor:
    """[B, K] k - k_err, at least 0; 0 everywhere in trajectories without a wrong step."""
    assert x.wrong_BK is not None
    num_steps = x.d_BK.shape[1]
    k_K = torch.arange(num_steps, device=x.d_BK.device)
    never = torch.full_like(x.wrong_BK, num_steps, dtype=torch.long)
    k_err_B1 = torch.where(x.wrong_BK, k_K, never).amin(dim=1, keepdim=True)
    return (k_K - k_err_B1).clamp_min(0)


@register_step_weight("no_cap")
def _no_cap(x: StepWeightInputs) -> torch.Tensor:
    """(d_1 + epsilon) / (d_k + epsilon), unbounded; exactly 1 on the first valid step."""
    ratio_BK = (x.anchor_B1 + x.epsilon) / (x.d_BK + x.epsilon)
    return torch.where(_is_first(x.valid_BK), 1.0, ratio_BK)


@register_step_weight("sod")
def _sod(x: StepWeightInputs) -> torch.Tensor:
    """The paper's weight: the ratio, capped at 1 + delta."""
    return _no_cap(x).clamp_max(1.0 + x.delta)


@register_step_weight("uniform")
def _uniform(x: StepWeightInputs) -> torch.Tensor:
    """1 everywhere: plain on-policy distillation."""
    return torch.ones_like(x.d_BK)


@register_step_weight("running_clip")
def _running_clip(x: StepWeightInputs) -> torch.Tensor:
    """w_k = min(w_{k-1} * r_k, 1 + delta): the cap is carried on. Not the paper's rule."""
    weights = []
    w_B = torch.ones_like(x.anchor_B1[:, 0])
    d_last_B = x.anchor_B1[:, 0]
    first_BK = _is_first(x.valid_BK)
    for k in range(x.d_BK.shape[1]):
        stepped_B = (w_B * (d_last_B + x.epsilon) / (x.d_BK[:, k] + x.epsilon)).clamp_max(
            1.0 + x.delta
        )
        moves_B = x.valid_BK[:, k] & ~first_BK[:, k]
        w_B = torch.where(moves_B, stepped_B, w_B)
        d_last_B = torch.where(moves_B, x.d_BK[:, k], d_last_B)
        weights.append(w_B)
    return torch.stack(weights, dim=1) if weights else torch.ones_like(x.d_BK)


@register_step_weight("heuristic", needs=("wrong_BK",))
def _heuristic(x: StepWeightInputs) -> torch.Tensor:
    """1 up to the first wrong tool outcome, then 0.9 per further step."""
    return torch.pow(0.9, _steps_after_first_error(x).double())


@register_step_weight("mask_after_wrong", needs=("wrong_BK",))
def _mask_after_wrong(x: StepWeightInputs) -> torch.Tensor:
    """1 up to and including the first wrong step, 0 after it."""
    return (_steps_after_first_error(x) == 0).double()
