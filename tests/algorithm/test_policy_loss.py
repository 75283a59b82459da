"""The clipped surrogate against hand-checked values, its gradient, and its bounds.

Layer: pure. The whole loss over packs and ranks: tests/train.
"""

import math

import pytest
import torch

from megatron_sod.algorithm.policy_loss import (
    clipped_rows,
    clipped_surrogate,
    importance_ratio,
)


def _loss(advantages, ratios, **options):
    options = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0} | options
    old = torch.full((len(ratios),), -1.7, dtype=torch.float64)
    logprobs = (old + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    loss = clipped_surrogate(logprobs, old, torch.tensor(advantages, dtype=old.dtype), **options)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    return loss.detach(), gradient


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    [
        # gradient with respect to the logprob is -A rho where the ratio is not clipped, else 0
        (0.8, 1.5, -1.024, 0.0),  # clipped at 1.28
        (0.8, 0.5, -0.4, -0.4),
        (0.8, 1.0, -0.8, -0.8),
        (-2, 1.5, 3.0, 3.0),
        (-2, 0.5, 1.6, 0.0),  # clipped at 0.8
        (-2, 4, 6.0, 0.0),  # dual clip: 3 x 2
        (-15, 4, 45.0, 0.0),  # dual clip: 3 x 15
        (0.0, 7.0, 0.0, 0.0),
    ],
)
def test_worked_examples(advantage, ratio, loss, gradient):
    found, slope = _loss([advantage], [ratio])
    assert float(found) == pytest.approx(loss, rel=1e-12)
    assert float(slope) == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize(
    ("advantage", "ratio", "is_clipped", "is_dual"),
    [
        (0.8, 1.5, True, False),
        (0.8, 0.5, False, False),  # outside the interval, where the plain term decides
        (-2, 1.5, False, False),
        (-2, 0.5, True, False),
        (-2, 4, False, True),  # 8 > 6
        (2, 4, True, False),
        (0.0, 7.0, False, False),
        (-2, 1.0, False, False),
    ],
)
def test_a_row_counts_as_clipped_where_the_clip_decides_its_loss(
    advantage, ratio, is_clipped, is_dual
):
    old = torch.zeros(1, dtype=torch.float64)
    new = torch.tensor([ratio], dtype=torch.float64).log()
    clipped, dual = clipped_rows(
        new, old, torch.tensor([float(advantage)]), clip_low=0.2, clip_high=0.28, dual_clip=3.0
    )
    assert (bool(clipped), bool(dual)) == (is_clipped, is_dual)


def test_at_ratio_one_the_loss_is_minus_the_advantage():
    advantages = [0.3, -2.5, 0.0, 17.0]
    loss, gradient = _loss(advantages, [1.0] * 4)
    assert loss.tolist() == [-a for a in advantages] == gradient.tolist()


def test_descending_the_loss_raises_tokens_with_positive_advantage():
    _, gradient = _loss([1.0, -1.0], [1.0, 1.0])
    assert gradient[0] < 0 < gradient[1]


@pytest.mark.parametrize("ratio", [0.3, 0.79, 0.81, 1.0, 1.27, 1.29, 2.9, 3.1, 50.0])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_loss_equals_the_definition_written_out(advantage, ratio):
    clipped = min(max(ratio, 0.8), 1.28)
    expected = max(-advantage * ratio, -advantage * clipped)
    if advantage < 0:
        expected = min(expected, -3 * advantage)
    assert float(_loss([advantage], [ratio])[0]) == pytest.approx(expected, rel=1e-12)


def test_clip_ranges_are_options():
    assert float(_loss([1.0], [1.5], clip_high=0.4)[0]) == pytest.approx(-1.4)
    assert float(_loss([-1.0], [0.5], clip_low=0.4)[0]) == pytest.approx(0.6)
    assert float(_loss([-1.0], [9.0], dual_clip=5.0)[0]) == pytest.approx(5.0)


def test_the_ratio_stays_finite_for_any_pair_of_logprobs():
    ratio = importance_ratio(torch.tensor([0.0, -900.0]), torch.tensor([-900.0, 0.0]))
    assert ratio.tolist() == pytest.approx([math.exp(20), math.exp(-20)])


def test_nothing_is_reduced():
    loss = clipped_surrogate(
        torch.zeros(5), torch.zeros(5), torch.ones(5), clip_low=0.2, clip_high=0.2, dual_clip=3.0
    )
    assert loss.shape == (5,)
    empty = clipped_surrogate(
        torch.zeros(0), torch.zeros(0), torch.zeros(0), clip_low=0.2, clip_high=0.2, dual_clip=3.0
    )
    assert empty.shape == (0,)
