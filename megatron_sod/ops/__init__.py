"""The vocab-parallel op: divergences, step weights and their gradient behind one function each."""

from megatron_sod.algorithm.step_weights import register_step_weight
from megatron_sod.ops.divergence import differentiable_divergence, vocab_parallel_divergence
from megatron_sod.ops.stats import DivergenceStats
from megatron_sod.ops.step_kl import StepInfo, step_weighted_kl
from megatron_sod.ops.step_reduce import packed_step_weights

__all__ = [
    "DivergenceStats",
    "StepInfo",
    "differentiable_divergence",
    "packed_step_weights",
    "register_step_weight",
    "step_weighted_kl",
    "vocab_parallel_divergence",
]
