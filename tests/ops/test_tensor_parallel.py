"""The op over 2, 3 and 4 gloo ranks equals one rank: values, gradients, bits, collectives.

Uneven shards: the last rank holds padding, at four ranks nearly nothing else. One spawn per world
size runs everything; the tests below look at its results. Compiled or reference, whichever serves.
"""

import functools

import pytest
import torch

from megatron_sod.ops import (
    HeadPair,
    differentiable_divergence,
    fused_linear_loss,
    step_weighted_kl,
)
from megatron_sod.ops.reference import reference_divergence
from tests.helpers.gloo import run_on_ranks
from tests.ops import ranks
from tests.ops.cases import ALL_FIELDS, random_case, weighted_sum

pytestmark = pytest.mark.dist
WORLDS = (2, 3, 4)


@functools.cache
def results(world: int) -> list[dict]:
    return run_on_ranks(world, ranks.everything)


def unsharded(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("world", WORLDS)
def test_values_and_gradients_are_unchanged_by_tp_size(world):
    student, teacher, targets = random_case(vocab=37, padded=37)
    student.requires_grad_()
    one = differentiable_divergence(
        student, teacher, targets, vocab_start=0, vocab_size=37, temperature=0.7, jsd_beta=0.3
    )
    weighted_sum(one).backward()
    found = results(world)
    for name in ALL_FIELDS:
        got = found[0]["float64"][name]
        torch.testing.assert_close(got, getattr(one, name).detach(), rtol=1e-12, atol=1e-12)
    for kind in ("float64", "inplace"):
        gradient = unsharded([rank[kind]["gradient"] for rank in found])
        torch.testing.assert_close(gradient[:, :37], student.grad, rtol=1e-12, atol=1e-12)
        assert (gradient[:, 37:] == 0).all() and gradient.shape[1] > 37
    reference = reference_divergence(
        student, teacher, targets, vocab_size=37, temperature=0.7, jsd_beta=0.3
    )
    for name in ("precise_kl", "functional_kl"):
        torch.testing.assert_close(found[0]["float64"][name], reference.reverse_kl.detach())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_all_ranks_hold_the_same_bits(world, dtype):
    found = results(world)
    for rank in found[1:]:
        for name in (*ALL_FIELDS, "precise_kl", "functional_kl"):
            assert torch.equal(rank[dtype][name], found[0][dtype][name]), name


@pytest.mark.parametrize("world", WORLDS)
def test_one_collective_and_jsd_adds_one(world):
    counted = results(world)[0]["collectives"]
    assert counted["plain"] == [("all_gather_into_tensor", 40)]  # 10 float32 per token
    for extra in ("jsd", "precise"):
        assert [name for name, _ in counted[extra]] == ["all_gather_into_tensor"] * 2
        assert sum(size for _, size in counted[extra]) == 56


def test_one_rank_needs_no_collective():
    assert run_on_ranks(1, ranks.counted_collectives, 0.3, True) == [[]]


@pytest.mark.parametrize("world", WORLDS)
def test_fused_linear_is_unchanged_by_tp_size(world):
    hidden, head, teacher_hidden, teacher_head, targets = ranks.linear_case()
    hidden.requires_grad_(), head.requires_grad_()
    heads = HeadPair(head, teacher_head, 0, 37, chunk_rows=7)
    loss, _ = fused_linear_loss(
        hidden, teacher_hidden, targets, heads, lambda stats, rows: stats.reverse_kl * (1.0 + rows)
    )
    loss.backward()
    found = [rank["fused_linear"] for rank in results(world)]
    for rank in found:
        torch.testing.assert_close(rank["loss"], loss.detach())
        torch.testing.assert_close(rank["hidden"], hidden.grad)
    stacked = torch.cat([rank["head"] for rank in found])[:37]
    torch.testing.assert_close(stacked, head.grad)


@pytest.mark.parametrize("world", WORLDS)
def test_steps_may_be_cut_between_context_parallel_ranks(world):
    student, teacher, targets, step_ids, trajectory_ids, _ = ranks.steps_case()
    student.requires_grad_()
    loss, info = step_weighted_kl(
        student, teacher, targets, step_ids, trajectory_ids, vocab_start=0, vocab_size=37
    )
    loss.sum().backward()
    for rank, found in enumerate(r["context_parallel"] for r in results(world)):
        mine = torch.arange(len(targets)) % world == rank
        torch.testing.assert_close(found["d"], info.step_divergence)
        torch.testing.assert_close(found["w"], info.step_weights)
        torch.testing.assert_close(found["loss"], loss[mine].detach())
        torch.testing.assert_close(found["gradient"], student.grad[mine])


@pytest.mark.parametrize("world", WORLDS)
def test_logprobs_agree_with_megatron_core(world):
    for theirs, ours in (rank["megatron"] for rank in results(world)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
