"""The op with one well-known mistake each, and the comparison that must notice it."""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_sod.ops import divergence
from tests.ops import ranks
from tests.ops.cases import random_case, weighted_sum


def matches_one_rank(loss_fn=None) -> dict[str, bool]:
    """Whether values and this rank's gradient equal the unsharded float64 reference."""
    from megatron_sod.ops.reference import reference_divergence

    rank, world = dist.get_rank(), dist.get_world_size()
    student, teacher, targets = random_case(vocab=ranks.VOCAB, padded=ranks.VOCAB)
    student.requires_grad_()
    want = reference_divergence(
        student, teacher, targets, vocab_size=ranks.VOCAB, temperature=0.7, jsd_beta=0.3
    )
    wanted = weighted_sum(want) if loss_fn is None else want.reverse_kl.sum()
    wanted.backward()
    width = ranks.shard_width(world)
    expected = ranks.padded_shard(student.grad, width, rank, 0.0)
    if loss_fn is None:
        found = ranks.op_on_shards(torch.float64)
        value, gradient = found["reverse_kl"], found["gradient"]
    else:
        z = ranks.padded_shard(student.detach(), width, rank, 0.0).requires_grad_()
        y = ranks.padded_shard(teacher, width, rank, 0.0)
        value = loss_fn(z, y, targets, rank * width)
        value.sum().backward()
        gradient = z.grad
    return {
        "value": torch.allclose(value, want.reverse_kl.detach(), atol=1e-9),
        "gradient": torch.allclose(gradient, expected, atol=1e-9),
    }


@contextmanager
def replaced(owner, name, make):
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def gradient_times_tp(original):
    """An autograd all-reduce of a replicated loss: every rank's gradient is counted TP times."""
    return lambda *args: original(*args) * torch.tensor([2.0] * 5 + [1.0])


def first_elements_coefficient(original):
    """The first row's upstream gradient for every row."""
    return lambda *args: original(*args)[:1].expand(6, -1).contiguous()


def padding_counts(original):
    """valid_cols = the whole shard: whatever the padded columns hold joins the sums."""

    class Call(original):
        def __init__(self, *args):
            super().__init__(*args)
            self.valid_cols = self.student.shape[1]

    return Call


def label_on_every_rank(original):
    """Every rank believes that its column (target mod width) is the target's."""

    class Call(original):
        def __init__(self, *args):
            super().__init__(*args)
            self.targets = torch.where(
                self.targets < 0, self.targets, self.targets % 20 + self.vocab_start
            ).clamp_max(ranks.VOCAB - 1)

    return Call


def local_maximum_forgotten(original):
    """Partial sums added up without bringing them to one maximum."""

    def gather(local, group):
        gathered = original(local, group)
        if gathered.shape[-1] == 10:
            gathered = gathered.clone()
            gathered[:, :, 0] = gathered[:1, :, 0]
        return gathered

    return gather


def non_autograd_all_reduce(z, y, targets, vocab_start) -> torch.Tensor:
    """Reverse KL whose normaliser is summed over ranks behind autograd's back."""
    live = (torch.arange(z.shape[1]) + vocab_start < ranks.VOCAB)[None]

    def log_softmax(x):
        x = torch.where(live, x / 0.7, -1e30)
        top = x.detach().amax(dim=1, keepdim=True)
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
        total = (x - top).exp().sum(dim=1, keepdim=True)
        dist.all_reduce(total.data)  # the value is right, its derivative is the local one
        return x - top - total.log()

    lp, lq = log_softmax(z), log_softmax(y)
    kl = torch.where(live, lp.exp() * (lp - lq), 0.0).sum(dim=1)
    dist.all_reduce(kl.data)
    return torch.where(targets < 0, 0.0, kl)


MUTANTS = {
    "gradient_times_tp": ("_coefficients", gradient_times_tp),
    "first_elements_coefficient": ("_coefficients", first_elements_coefficient),
    "padding_counts": ("_Call", padding_counts),
    "label_on_every_rank": ("_Call", label_on_every_rank),
    "local_maximum_forgotten": ("gather_ranks", local_maximum_forgotten),
}


def all_verdicts() -> dict[str, dict[str, bool]]:
    """Verdict of the comparison on the real op and on each mutant."""
    verdicts = {"real": matches_one_rank()}
    for name, (target, make) in MUTANTS.items():
        with replaced(divergence, target, make):
            verdicts[name] = matches_one_rank()
    verdicts["non_autograd_all_reduce"] = matches_one_rank(non_autograd_all_reduce)
    return verdicts
