"""An Adam that keeps its state where Transformer-Engine's and apex's FusedAdam keep theirs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.optimizer import distrib_optimizer


class FusedAdam(torch.optim.Optimizer):
    """The step count is an integer of the group, `bias_correction` a setting of it, and a parameter
    has two moments and nothing else. Computed as torch's AdamW."""

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True
    ):
        assert adam_w_mode
        defaults = dict(
            lr=lr, bias_correction=True, betas=betas, eps=eps, weight_decay=weight_decay
        )
        super().__init__(params, defaults)

    def load_state_dict(self, state_dict):
        for state in state_dict["state"].values():
            assert state.keys() <= {"exp_avg", "exp_avg_sq"}, state.keys()
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            assert isinstance(group["step"], int), "the kernel takes an int"
            assert group["bias_correction"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter, group):
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        scale = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        step_size = group["lr"] / (1 - beta1 ** group["step"])
        parameter.addcdiv_(state["exp_avg"], scale, value=-step_size)


@contextlib.contextmanager
def fused_adam() -> Iterator[None]:
    """Megatron takes it for Transformer-Engine's. Enter after the process groups exist: starting
    them on CPU chooses torch's."""
    with (
        mock.patch.multiple(megatron_optimizer, Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False),
        mock.patch.multiple(
            distrib_optimizer, Adam=FusedAdam, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True
        ),
    ):
        yield
