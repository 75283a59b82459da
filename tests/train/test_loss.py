"""The loss multiplies each row by its importance, as a constant.

Layer: pure, a model that is only its logits. Layouts: tests/scoring/test_certificate.py; the
surrogate: tests/algorithm; the divergences: tests/ops.
"""

from types import SimpleNamespace

import pytest
import torch

from megatron_sod.data.packing import PackItem, pack
from megatron_sod.train.loss import make_loss_fn
from megatron_sod.types import TokenCredit, TokenScores
from tests.helpers.tiny import sod_config

VOCAB = 7
TOKENS = [3, 1, 4, 1, 5]


def _loss_and_gradient(loss: str, importance: list[float]):
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(4, VOCAB, generator=generator) for _ in range(2))
    hidden = logits.requires_grad_()
    batch = pack([PackItem(TOKENS, [False] + [True] * 4, [0, 1, 1, 2, 2], [0.0] * 5, 0)])
    model = SimpleNamespace(
        output_logits=lambda hidden, rows: hidden.clone(),
        vocab_start=0,
        real_vocab_size=VOCAB,
        pg_collection=SimpleNamespace(tp=None),
    )
    frozen = SimpleNamespace(head_weight=lambda: torch.eye(VOCAB))
    student = hidden.detach().log_softmax(-1)[range(4), TOKENS[1:]]
    credit = TokenCredit(
        student - 0.1,
        torch.tensor([0.5, -0.5, 1.0, -2.0]),
        torch.tensor([1.0, 0.4, 1.2, 0.7]),
        torch.tensor([0.3, -0.2, 0.1, 0.6]),
        torch.tensor(importance),
    )
    entropy = torch.zeros(4)
    held = teacher if loss == "reverse_kl" else None
    scores = TokenScores(student, entropy, student, entropy, entropy, held)
    config = sod_config("s", "t", distill={"loss": loss})
    total, count, collected = make_loss_fn(model, frozen, [credit], [scores], config)(
        hidden, batch, 0
    )
    total.backward()
    assert int(count) == 4 and float(collected["loss"]) == pytest.approx(total.item())
    return total.item(), hidden.grad


@pytest.mark.parametrize("loss", ["sampled_advantage", "sampled_separate", "reverse_kl"])
def test_loss_and_gradient_are_linear_in_the_importance_of_each_row(loss):
    weights = [0.5, 1.0, 2.0, 0.0]
    _, plain = _loss_and_gradient(loss, [1.0] * 4)
    total, weighed = _loss_and_gradient(loss, weights)
    assert torch.allclose(weighed, plain * torch.tensor(weights)[:, None], atol=1e-7)
    parts = [_loss_and_gradient(loss, [float(i == r) for i in range(4)])[0] for r in range(4)]
    assert total == pytest.approx(sum(w * p for w, p in zip(weights, parts, strict=True)))
    assert float(plain.abs().max()) > 0
