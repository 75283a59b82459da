"""What SOD computes, in pure torch: no Megatron, no Ray, no compiled code."""

from megatron_sod.algorithm.step_weights import (
    STEP_WEIGHTS,
    StepWeightInputs,
    register_step_weight,
    step_weights,
)
from megatron_sod.algorithm.steps import (
    packed_step_divergence,
    quantile_over_ranks,
    segment_sums,
    step_divergence,
    token_weights,
    valid_steps,
)

__all__ = [
    "STEP_WEIGHTS",
    "StepWeightInputs",
    "packed_step_divergence",
    "quantile_over_ranks",
    "register_step_weight",
    "segment_sums",
    "step_divergence",
    "step_weights",
    "token_weights",
    "valid_steps",
]
