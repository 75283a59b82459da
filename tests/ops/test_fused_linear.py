"""Hidden states in, loss and gradients out: equal to full logits, without ever holding them.

Layers: float64 equality, bfloat16 with main_grad, memory, refusals. Several ranks:
tests/ops/test_tensor_parallel.py.
"""

import pytest
import torch

from megatron_sod.errors import OpError
from megatron_sod.ops import (
    HeadPair,
    differentiable_divergence,
    fused_linear_divergence,
    fused_linear_loss,
)
from megatron_sod.ops import fused_linear as module
from megatron_sod.ops.reference import reference_divergence

TOKENS, HIDDEN, TEACHER_HIDDEN, VOCAB, PADDED = 11, 6, 9, 37, 40


def make(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    targets[[1, 2, 7]] = -100
    return (
        draw(TOKENS, HIDDEN),
        draw(PADDED, HIDDEN),
        draw(TOKENS, TEACHER_HIDDEN),
        draw(PADDED, TEACHER_HIDDEN),
        targets,
    )


def pair(head, teacher_head, **options):
    defaults = dict(vocab_start=0, vocab_size=VOCAB, temperature=0.8, jsd_beta=0.4, chunk_rows=3)
    return HeadPair(head, teacher_head, **{**defaults, **options})


def loss_of(weights):
    def loss(stats, rows):
        """All outputs at once, and something that is not linear in a logprob."""
        ratio = (stats.student_logprobs * 0.3).exp()
        terms = stats.reverse_kl + 0.5 * stats.forward_kl + stats.jsd - 0.1 * stats.student_entropy
        return weights[rows] * (terms - ratio)

    return loss


def test_loss_statistics_and_gradients_equal_the_full_logits():
    hidden, head, teacher_hidden, teacher_head, targets = make()
    weights = torch.linspace(0.1, 2.0, TOKENS, dtype=torch.float64)
    hidden.requires_grad_(), head.requires_grad_()
    loss, stats = fused_linear_loss(
        hidden, teacher_hidden, targets, pair(head, teacher_head), loss_of(weights)
    )
    (loss * 0.25).backward()
    x, w = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    want = reference_divergence(
        x @ w.t(),
        teacher_hidden @ teacher_head.t(),
        targets,
        vocab_size=VOCAB,
        temperature=0.8,
        jsd_beta=0.4,
    )
    # ignored rows have all statistics 0, so their ratio is 1: leave them out
    full = torch.where(targets >= 0, loss_of(weights)(want, torch.arange(TOKENS)), 0.0).sum()
    (full * 0.25).backward()
    torch.testing.assert_close(loss, full)
    torch.testing.assert_close(hidden.grad, x.grad)
    torch.testing.assert_close(head.grad, w.grad)
    assert (hidden.grad[targets < 0] == 0).all() and (head.grad[VOCAB:] == 0).all()
    scored = fused_linear_divergence(hidden, teacher_hidden, targets, pair(head, teacher_head))
    for name, value in vars(want).items():
        torch.testing.assert_close(getattr(stats, name), value.detach())
        assert torch.equal(getattr(scored, name), getattr(stats, name))


@pytest.mark.parametrize("chunk_rows", [1, 2, 8, 100])
def test_the_chunk_size_changes_nothing(chunk_rows):
    hidden, head, teacher_hidden, teacher_head, targets = make()
    weights = torch.ones(TOKENS, dtype=torch.float64)
    grads = []
    for rows in (3, chunk_rows):
        x = hidden.clone().requires_grad_()
        heads = pair(head, teacher_head, chunk_rows=rows)
        fused_linear_loss(x, teacher_hidden, targets, heads, loss_of(weights))[0].backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_without_a_teacher_it_is_a_policy_gradient():
    hidden, head, _, _, targets = make()
    hidden.requires_grad_()
    heads = pair(head, None, jsd_beta=None)
    loss, stats = fused_linear_loss(
        hidden, None, targets, heads, lambda s, rows: -s.student_logprobs
    )
    loss.backward()
    x = hidden.detach().requires_grad_()
    logits = (x @ head.t())[:, :VOCAB] / 0.8
    full = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    full.backward()
    torch.testing.assert_close(loss, full)
    torch.testing.assert_close(hidden.grad, x.grad)
    assert stats.reverse_kl is None


def test_the_heads_gradient_goes_to_main_grad():
    hidden, head, teacher_hidden, teacher_head, targets = make(torch.bfloat16)
    head = torch.nn.Parameter(head)
    head.main_grad = torch.full(head.shape, 2.0)  # what earlier micro-batches left
    head.grad_added_to_main_grad = False
    weights = torch.ones(TOKENS)
    loss, _ = fused_linear_loss(
        hidden, teacher_hidden, targets, pair(head, teacher_head), loss_of(weights)
    )
    loss.backward()
    plain = head.detach().clone().requires_grad_()
    logits = (hidden @ plain.t()).float()
    stats = differentiable_divergence(
        logits,
        (teacher_hidden @ teacher_head.t()).float(),
        targets,
        vocab_start=0,
        vocab_size=VOCAB,
        temperature=0.8,
        jsd_beta=0.4,
    )
    torch.where(targets >= 0, loss_of(weights)(stats, torch.arange(TOKENS)), 0.0).sum().backward()
    assert head.grad_added_to_main_grad and (head.grad == 0).all()
    error = (head.main_grad - 2.0 - plain.grad.float()).abs().max()
    assert error < 0.02 * plain.grad.float().abs().max()


def test_no_logits_beyond_one_chunk_are_alive(monkeypatch):
    hidden, head, teacher_hidden, teacher_head, targets = make()
    seen = []
    original = module._chunk_logits

    def spy(*args):
        logits = original(*args)
        seen.append(tuple(logits[0].shape))
        return logits

    monkeypatch.setattr(module, "_chunk_logits", spy)
    hidden.requires_grad_()
    fused_linear_loss(
        hidden, teacher_hidden, targets, pair(head, teacher_head), lambda s, rows: s.reverse_kl
    )[0].backward()
    # 8 rows carry loss: 3 + 3 + 2, and the 3 ignored rows never reach a head
    assert seen == [(3, PADDED), (3, PADDED), (2, PADDED)]


def test_all_rows_ignored_gives_zero_and_zero_gradients():
    hidden, head, teacher_hidden, teacher_head, targets = make()
    hidden.requires_grad_(), head.requires_grad_()
    loss, stats = fused_linear_loss(
        hidden,
        teacher_hidden,
        torch.full_like(targets, -100),
        pair(head, teacher_head),
        lambda s, rows: s.reverse_kl,
    )
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all() and (head.grad == 0).all()
    assert (stats.reverse_kl == 0).all()


def test_mistakes_are_named():
    hidden, head, teacher_hidden, teacher_head, targets = make()
    heads = pair(head, teacher_head)
    for args, match in [
        ((hidden[:, :2], teacher_hidden, targets, heads), "student hidden"),
        ((hidden, None, targets, heads), "come together"),
        ((hidden, teacher_hidden[:2], targets, heads), "teacher hidden"),
        ((hidden, teacher_hidden, targets, pair(head, teacher_head, chunk_rows=0)), "chunk_rows"),
    ]:
        with pytest.raises(OpError, match=match):
            fused_linear_divergence(*args)
    with pytest.raises(OpError, match="one loss per row"):
        fused_linear_loss(hidden, teacher_hidden, targets, heads, lambda s, r: s.reverse_kl.sum())
