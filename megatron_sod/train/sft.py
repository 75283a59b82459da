"""Cold start: supervised training on whole conversations, loss on the assistant's tokens only."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sod.config.schema import SftConfig
from megatron_sod.data.chat import ChatFormat
from megatron_sod.data.packing import PackItem, pack, plan_micro_batches
from megatron_sod.data.sources import load_conversations, load_tokenizer, tool_schemas
from megatron_sod.errors import DataError
from megatron_sod.model.build import build_model
from megatron_sod.model.geometry import load_geometry
from megatron_sod.model.weights import export_hf, has_weights, load_hf_weights
from megatron_sod.observe.progress import progress
from megatron_sod.ops import differentiable_divergence
from megatron_sod.parallel import state
from megatron_sod.parallel.cpu import device
from megatron_sod.train.trainable import Trainable
from megatron_sod.types import MicroBatch


def run_sft(config: SftConfig) -> dict[str, float]:
    """Train and write the result to `config.out`. Returns the last logged metrics."""
    torch.manual_seed(config.seed)
    state.initialize(config.student.parallel, seed=config.seed)
    groups = state.process_groups()
    geometry = load_geometry(config.student.path)
    model = build_model(geometry, config.student.parallel, groups, dtype=config.student.dtype)
    if has_weights(config.student.path):
        load_hf_weights(model, geometry, config.student.path)
    trainable = Trainable(model, geometry, config.train)
    scheduler = _schedule(trainable, config)
    items = _render(config)
    batches = _batches(items, config, groups)
    metrics: dict[str, float] = {}
    started = time.monotonic()
    loss_fn = _loss_fn(model, groups.tp)
    with progress("cold start", config.train.num_steps, unit="step") as bar:
        for step in range(1, config.train.num_steps + 1):
            result = trainable.step(next(batches), loss_fn)
            scheduler.step(increment=1)
            if step % config.train.log_interval == 0 or step == config.train.num_steps:
                metrics = _metrics(result, groups)
                bar.update(step, **metrics)
    metrics["wall_s"] = time.monotonic() - started
    export_hf(model, geometry, config.out, config.student.path)
    return metrics


def _render(config: SftConfig) -> list[PackItem]:
    tokenizer = load_tokenizer(config.student.path)
    tools = tool_schemas() if config.data.tools_in_prompt else None
    chat = ChatFormat(tokenizer, tools=tools)
    limit = min(config.data.max_length, config.train.tokens_per_micro_batch)
    items: list[PackItem] = []
    for messages in load_conversations(config.data.conversations, seed=config.seed):
        rendered = chat.conversation(messages)
        items.append(
            PackItem(
                rendered.token_ids[:limit],
                rendered.loss_mask[:limit],
                rendered.step_ids[:limit],
                [0.0] * len(rendered.token_ids[:limit]),
                len(items),
            )
        )
    if len(items) < config.train.global_batch_size:
        raise DataError(
            f"data.conversations: {len(items)} conversations, fewer than train.global_batch_size "
            f"{config.train.global_batch_size}; add data or lower the batch size"
        )
    return items


def _batches(items: list[PackItem], config: SftConfig, groups) -> Iterator[list[MicroBatch]]:
    """Micro-batches of this rank, batch after batch, reshuffled each epoch."""
    rng = random.Random(config.seed)
    order: list[int] = []
    size = config.train.global_batch_size
    while True:
        if len(order) < size:
            order += rng.sample(range(len(items)), len(items))
        chosen, order = [items[i] for i in order[:size]], order[size:]
        plan = plan_micro_batches(
            [len(item.token_ids) for item in chosen],
            dp_size=groups.dp.size(),
            tokens_per_micro_batch=config.train.tokens_per_micro_batch,
        )[groups.dp.rank()]
        multiple = groups.tp.size() if config.student.parallel.sequence_parallel else 1
        yield [pack([chosen[i] for i in indices], multiple_of=multiple) for indices in plan]


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


def _schedule(trainable: Trainable, config: SftConfig) -> OptimizerParamScheduler:
    train = config.train
    return OptimizerParamScheduler(
        trainable.optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.lr * train.min_lr_ratio,
        lr_warmup_steps=int(train.warmup_ratio * train.num_steps),
        lr_decay_steps=train.num_steps,
        lr_decay_style="cosine",
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=train.num_steps,
        wd_incr_style="constant",
    )


def _metrics(result, groups) -> dict[str, float]:
    """Global mean loss per token. A collective over the data-parallel and pipeline groups."""
    sums = torch.zeros(2, dtype=torch.float64, device=device())
    for loss, count in result.collected:
        sums += torch.stack([loss.double(), count.double()])
    for group in (groups.dp, groups.pp):
        dist.all_reduce(sums, group=group)
    return {"loss": float(sums[0] / sums[1]), "grad_norm": result.grad_norm}
