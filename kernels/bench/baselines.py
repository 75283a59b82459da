"""What the op is compared with, each written here from its definition: same inputs, same results.

T tokens, V vocabulary. `forward` returns per-token reverse KL (or, for cross-entropy, logprobs);
`step` also brings the gradient of their sum back to the student logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def eager_kl(student_TV: torch.Tensor, teacher_TV: torch.Tensor) -> torch.Tensor:
    """Reverse KL as one writes it: two log-softmaxes in the logits' dtype's float, and a sum."""
    log_p = F.log_softmax(student_TV.float(), dim=-1)
    log_q = F.log_softmax(teacher_TV.float(), dim=-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def sharded_kl(student_TV: torch.Tensor, teacher_TV: torch.Tensor) -> torch.Tensor:
    """A tensor-parallel KL of the usual shape: float copies, max, exp, sum, log, under autograd.

    What Model-Optimizer's Megatron plugin computes, re-stated; its collectives are left out,
    because one rank has none to wait for.
    """

    def log_probs(logits):
        logits = logits.float()
        logits = logits - logits.detach().amax(dim=-1, keepdim=True)
        return logits - logits.exp().sum(dim=-1, keepdim=True).log()

    log_p, log_q = log_probs(student_TV), log_probs(teacher_TV)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def megatron_cross_entropy(targets_T: torch.Tensor):
    """megatron-core's vocab_parallel_cross_entropy on a group of one; student only, no KL."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    def forward(student_TV, teacher_TV):
        # it overwrites its input
        return -vocab_parallel_cross_entropy(student_TV.clone()[:, None], targets_T[:, None])[:, 0]

    return forward


def step(forward, student_TV: torch.Tensor, teacher_TV: torch.Tensor) -> torch.Tensor:
    """Gradient of forward(...).sum() with respect to the student logits."""
    student_TV = student_TV.detach().requires_grad_()
    forward(student_TV, teacher_TV).sum().backward()
    return student_TV.grad
