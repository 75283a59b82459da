"""A model that learns: DDP, optimizer, and one step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_sod.model.geometry import Geometry
from megatron_sod.model.gpt import PipelineModel
from megatron_sod.observe.progress import say
from megatron_sod.parallel.cpu import device
from megatron_sod.parallel.residency import Residency
from megatron_sod.train.schedule import LossFn, forward_backward
from megatron_sod.types import MicroBatch


@dataclass(frozen=True)
class StepResult:
    """One optimizer step."""

    grad_norm: float  # before clipping; inf or NaN where it is no finite number
    is_applied: bool  # the same on all ranks; False: weights and optimizer stay as they were
    collected: list[Any]  # per micro-batch, on the last pipeline stage


class Trainable:
    """A Megatron model with its gradient buffers and optimizer."""

    def __init__(self, model: PipelineModel, geometry: Geometry, train):
        """`train` has lr, weight_decay, adam_beta1, adam_beta2, clip_grad and
        use_distributed_optimizer (TrainConfig or SftTrainConfig)."""
        self.model, self.geometry = model, geometry
        config = model.config
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=config.params_dtype == torch.bfloat16,
            use_distributed_optimizer=train.use_distributed_optimizer,
        )
        self.ddp_chunks = [
            DistributedDataParallel(config, ddp_config, chunk) for chunk in model.chunks
        ]
        model.runnable = list(self.ddp_chunks)
        self.optimizer: MegatronOptimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=train.lr,
                min_lr=train.lr * getattr(train, "min_lr_ratio", 1.0),
                weight_decay=train.weight_decay,
                adam_beta1=train.adam_beta1,
                adam_beta2=train.adam_beta2,
                clip_grad=train.clip_grad,
                bf16=config.params_dtype == torch.bfloat16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=train.use_distributed_optimizer,
            ),
            self.ddp_chunks,
            use_gloo_process_groups=False,
        )
        no_sync = [chunk.no_sync for chunk in self.ddp_chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss

    def let_leave(self, residency: Residency, *, parameters: bool, optimizer: bool) -> None:
        """Let parts leave the device while they are idle: "student", its parameters; "optimizer",
        Adam's state, the float32 parameters and the gradients."""
        if parameters:
            residency.may_leave("student", self.model.parameters)
        if optimizer:
            residency.may_leave("optimizer", self._optimizer_tensors)
            residency.may_leave("optimizer", self._gradients, keeps_content=False)

    def _optimizer_tensors(self) -> Iterator[torch.Tensor]:
        """All but the model's own parameters, of which a float32 optimizer holds views."""
        own = {parameter.untyped_storage() for parameter in self.model.parameters()}
        for part in self._parts():
            if part.optimizer is None:  # of a rank that holds no such parameters
                continue
            held = [t for group in part.optimizer.param_groups for t in group["params"]]
            held += [t for state in part.optimizer.state.values() for t in state.values()]
            for tensor in held:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in own:
                    yield tensor

    def _gradients(self) -> Iterator[torch.Tensor]:
        for chunk in self.ddp_chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):  # type: ignore[misc]
                yield buffer.grad_data

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def accumulate(self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn) -> list[Any]:
        """Fresh gradients of the mini-batch, divided by its global token count."""
        self.model.train()
        for chunk in self.ddp_chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return forward_backward(self.model, micro_batches, loss_fn)

    def step(self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn) -> StepResult:
        """One optimizer step on a mini-batch, left out when the gradient's norm is not finite on
        some rank. A collective over all trainer ranks."""
        collected = self.accumulate(micro_batches, loss_fn)
        self.optimizer.prepare_grads()
        # Megatron looks for such values only where a loss is scaled, which float16 alone needs.
        grad_norm = float(self.optimizer.get_grad_norm())
        is_applied = _is_finite_everywhere(grad_norm)
        if is_applied:
            self._clip(grad_norm)
            self.optimizer.step_with_ready_grads()
        else:
            found = "no number on another rank" if math.isfinite(grad_norm) else grad_norm
            say(
                f"an optimizer step is left out: the gradient's norm is {found}; weights and "
                "optimizer stay as they were"
            )
        return StepResult(grad_norm, is_applied, collected)

    def _clip(self, grad_norm: float) -> None:
        for part in self._parts():
            parameters = part.get_parameters()
            if parameters and part.config.clip_grad > 0:
                clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, grad_norm)

    def _parts(self) -> list[MegatronOptimizer]:
        """One optimizer of the experts and one of all else, or a single one."""
        return getattr(self.optimizer, "chained_optimizers", [self.optimizer])


def _is_finite_everywhere(grad_norm: float) -> bool:
    """Ranks that disagreed would part from their replicas, or wait for each other's weights."""
    is_bad = torch.tensor([not math.isfinite(grad_norm)], dtype=torch.int32, device=device())
    dist.all_reduce(is_bad, op=dist.ReduceOp.MAX)
    return not bool(is_bad)
