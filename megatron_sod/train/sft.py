"""Cold start: supervised training on whole conversations, loss on the assistant's tokens only."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sod.config.load import config_hash
from megatron_sod.config.schema import SftConfig
from megatron_sod.data.chat import ChatFormat
from megatron_sod.data.conversations import cold_start_data
from megatron_sod.data.order import PromptOrder
from megatron_sod.data.packing import PackItem, alignment_of, pack, plan_micro_batches
from megatron_sod.data.sources import load_conversations, tool_schemas
from megatron_sod.data.tokenizer import load_tokenizer
from megatron_sod.errors import DataError
from megatron_sod.model.geometry import load_geometry
from megatron_sod.model.weights import export_hf, load_model
from megatron_sod.observe.progress import progress, say
from megatron_sod.observe.run_dir import versions
from megatron_sod.ops import differentiable_divergence
from megatron_sod.parallel import state
from megatron_sod.parallel.cpu import device
from megatron_sod.train.checkpoint import Checkpoints, Description, Progress
from megatron_sod.train.trainable import Trainable
from megatron_sod.types import MicroBatch


def run_sft(config: SftConfig) -> dict[str, float]:
    """Train and write the result to `config.out`. Returns the last logged metrics."""
    torch.manual_seed(config.seed)
    state.initialize(config.student.parallel, seed=config.seed)
    groups = state.process_groups()
    items = _items(config)
    num_steps = _num_steps(config, len(items))
    geometry = load_geometry(config.student.path)
    model = load_model(config.student, geometry, groups)
    trainable = Trainable(model, geometry, config.train)
    saver = _Saver(config, trainable)
    done = saver.resume()
    scheduler = _schedule(trainable, config, num_steps)
    scheduler.step(increment=done)
    order = PromptOrder(len(items), config.seed)
    metrics: dict[str, float] = {}
    started = time.monotonic()
    loss_fn = _loss_fn(model, groups.tp)
    with progress("cold start", num_steps, unit="step", start=done) as bar:
        for step in range(done + 1, num_steps + 1):
            batch = _batch(items, order, step, config, groups)
            lr = trainable.optimizer.param_groups[0]["lr"]
            result = trainable.step(batch, loss_fn)
            scheduler.step(increment=1)
            if step % config.train.log_interval == 0 or step == num_steps:
                metrics = {**_metrics(result, groups), "lr": lr}
                bar.update(step, **metrics)
                saver.log({"step": step, "epoch": _epoch(config, step, len(items)), **metrics})
            if step % config.train.save_interval == 0 or step == num_steps:
                saver.save(step)
    saver.finish()
    metrics["wall_s"] = time.monotonic() - started
    export_hf(model, geometry, config.out, config.student.path)
    return metrics


def _items(config: SftConfig) -> list[PackItem]:
    chat = ChatFormat(
        load_tokenizer(config.student.path),
        tools=tool_schemas() if config.data.tools_in_prompt else None,
        enable_thinking=config.data.enable_thinking,
    )
    items = cold_start_data(
        load_conversations(config.data.conversations, seed=config.seed),
        chat,
        max_length=config.data.max_length,
        overlong=config.data.overlong,
    ).items
    if len(items) < config.train.global_batch_size:
        raise DataError(
            f"data.conversations: {len(items)} conversations, fewer than train.global_batch_size "
            f"{config.train.global_batch_size}; add data or lower the batch size"
        )
    return items


def _num_steps(config: SftConfig, num_items: int) -> int:
    train = config.train
    if train.num_steps is not None:
        return train.num_steps
    assert train.num_epochs is not None, "checked by the configuration's rules"
    return math.ceil(train.num_epochs * num_items / train.global_batch_size)


def _epoch(config: SftConfig, step: int, num_items: int) -> float:
    return round(step * config.train.global_batch_size / num_items, 3)


def _batch(
    items: list[PackItem], order: PromptOrder, step: int, config: SftConfig, groups
) -> list[MicroBatch]:
    """This rank's micro-batches of a step: a function of the step, so that a run can resume."""
    size, alignment = config.train.global_batch_size, alignment_of(config.student.parallel)
    chosen = [items[i] for i in order.draw((step - 1) * size, size)]
    plan = plan_micro_batches(
        [len(item.token_ids) for item in chosen],
        dp_size=groups.dp.size(),
        tokens_per_micro_batch=config.train.tokens_per_micro_batch,
        alignment=alignment,
    )[groups.dp.rank()]
    return [pack([replace(chosen[i], index=i) for i in indices], alignment) for indices in plan]


class _Saver:
    """Checkpoints and metrics.jsonl in `run_dir`; does nothing without one."""

    def __init__(self, config: SftConfig, trainable: Trainable):
        self._config, self._trainable = config, trainable
        self._folder = Path(config.run_dir) if config.run_dir else None
        self._checkpoints = None
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._checkpoints = Checkpoints(
                self._folder / "checkpoints",
                keep_last=config.train.keep_last,
                description=Description(
                    config.model_dump(mode="json"), versions(), config.student.path
                ),
            )

    def resume(self) -> int:
        """Steps done by the checkpoint `train.resume` names; 0 for a fresh start."""
        resume = self._config.train.resume
        if self._checkpoints is None or resume == "never":
            return 0
        path = self._checkpoints.latest() if resume == "auto" else resume
        if path is None:
            return 0
        done = self._checkpoints.load(self._trainable, path).iteration
        say(f"resumed after step {done}")
        for line in self._checkpoints.changes_since(path):
            say(f"since the checkpoint: {line}")
        return done

    def save(self, step: int) -> None:
        if self._checkpoints is not None:
            drawn = step * self._config.train.global_batch_size
            self._checkpoints.save(
                self._trainable, Progress(step, 0, drawn, step, config_hash(self._config))
            )

    def finish(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.finish()

    def log(self, row: dict[str, float]) -> None:
        if self._folder is not None and dist.get_rank() == 0:
            with (self._folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")


def _loss_fn(model, tp_group):
    def loss_fn(hidden, batch: MicroBatch, number: int):
        logits = model.output_logits(hidden, batch.rows)
        stats = differentiable_divergence(
            logits,
            None,
            batch.targets,
            vocab_start=model.vocab_start,
            vocab_size=model.real_vocab_size,
            group=tp_group,
            inplace=True,
        )
        loss = -stats.student_logprobs.sum()
        count = torch.tensor(batch.rows.numel(), device=hidden.device)
        return loss, count, (loss.detach(), count)

    return loss_fn


def _schedule(trainable: Trainable, config: SftConfig, num_steps: int) -> OptimizerParamScheduler:
    train = config.train
    return OptimizerParamScheduler(
        trainable.optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.lr * train.min_lr_ratio,
        lr_warmup_steps=int(train.warmup_ratio * num_steps),
        lr_decay_steps=num_steps,
        lr_decay_style="cosine",
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
    )


def _metrics(result, groups) -> dict[str, float]:
    """Global mean loss per token. A collective over the data-parallel and pipeline groups."""
    sums = torch.zeros(2, dtype=torch.float64, device=device())
    for loss, count in result.collected:
        sums += torch.stack([loss.double(), count.double()])
    for group in (groups.dp_cp, groups.pp):
        dist.all_reduce(sums, group=group)
    return {
        "loss": float(sums[0] / sums[1]),
        "loss_tokens": float(sums[1]),
        "grad_norm": result.grad_norm,
    }
