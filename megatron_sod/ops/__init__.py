"""The vocab-parallel op: divergences, step weights and their gradient behind one function each."""

from megatron_sod.algorithm.step_weights import register_step_weight
from megatron_sod.ops.divergence import differentiable_divergence, vocab_parallel_divergence
from megatron_sod.ops.functional import functional_divergence
from megatron_sod.ops.fused_linear import HeadPair, fused_linear_divergence, fused_linear_loss
from megatron_sod.ops.stats import DivergenceStats
from megatron_sod.ops.step_kl import StepInfo, step_weighted_kl
from megatron_sod.ops.step_reduce import packed_step_weights

__all__ = [
    "DivergenceStats",
    "HeadPair",
    "StepInfo",
    "differentiable_divergence",
    "functional_divergence",
    "fused_linear_divergence",
    "fused_linear_loss",
    "packed_step_weights",
    "register_step_weight",
    "step_weighted_kl",
    "vocab_parallel_divergence",
]
