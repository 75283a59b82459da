"""What each gloo rank runs in the op's distributed tests. Importable, so that spawn can find it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_sod.ops import (
    HeadPair,
    differentiable_divergence,
    functional_divergence,
    fused_linear_loss,
    step_weighted_kl,
    vocab_parallel_divergence,
)
from tests.ops.cases import ALL_FIELDS, random_case, weighted_sum

VOCAB = 37


def shard_width(world: int, spare: int = 3) -> int:
    """Columns per rank: uneven, so that the last rank holds padding (all of it, where it can)."""
    return -(-VOCAB // world) + spare


def padded_shard(full: torch.Tensor, width: int, rank: int, fill: float) -> torch.Tensor:
    """This rank's columns of a [T, VOCAB] tensor; what lies past the vocabulary is `fill`."""
    start, stop = rank * width, (rank + 1) * width
    shard = torch.full((full.shape[0], width), fill, dtype=full.dtype)
    shard[:, : max(0, min(stop, VOCAB) - start)] = full[:, start : min(stop, VOCAB)]
    return shard


def op_on_shards(dtype: torch.dtype, inplace: bool = False) -> dict[str, torch.Tensor]:
    """Statistics and this rank's gradient; the same global case on every rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    student, teacher, targets = random_case(vocab=VOCAB, padded=VOCAB, dtype=dtype)
    width = shard_width(world)
    z = padded_shard(student, width, rank, 1e3).requires_grad_()
    y = padded_shard(teacher, width, rank, -1e3)
    options = dict(vocab_start=rank * width, vocab_size=VOCAB, group=dist.group.WORLD)
    options |= dict(temperature=0.7, jsd_beta=0.3)
    logits = z.clone() if inplace else z
    stats = differentiable_divergence(logits, y, targets, inplace=inplace, **options)
    weighted_sum(stats).backward()
    found = {name: getattr(stats, name).detach() for name in ALL_FIELDS}
    precise = vocab_parallel_divergence(z, y, targets, precise_kl=True, **options)
    found["precise_kl"] = precise.reverse_kl
    found["functional_kl"] = functional_divergence(z.detach(), y, targets, **options).reverse_kl
    return found | {"gradient": z.grad}


def counted_collectives(jsd_beta: float | None, precise: bool) -> list[tuple[str, int]]:
    """Name and bytes sent per token of every collective one call makes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    student, teacher, targets = random_case(vocab=VOCAB, padded=VOCAB, dtype=torch.float32)
    width = shard_width(world)
    z = padded_shard(student, width, rank, 0.0).requires_grad_()
    y = padded_shard(teacher, width, rank, 0.0)
    calls: list[tuple[str, int]] = []
    names = ["all_gather_into_tensor", "all_gather", "all_reduce", "broadcast", "reduce_scatter"]
    originals = {name: getattr(dist, name) for name in names}

    def counted(name):
        def call(*args, **kwargs):
            sent = args[1] if name.startswith("all_gather") else args[0]
            calls.append((name, sent.numel() * sent.element_size() // len(targets)))
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counted(name))
    try:
        stats = differentiable_divergence(
            z,
            y,
            targets,
            vocab_start=rank * width,
            vocab_size=VOCAB,
            group=dist.group.WORLD,
            jsd_beta=jsd_beta,
            precise_kl=precise,
        )
        stats.reverse_kl.sum().backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return calls


def fused_linear_on_shards() -> dict[str, torch.Tensor]:
    """Loss, hidden gradient (summed over ranks) and this rank's head gradient."""
    rank, world = dist.get_rank(), dist.get_world_size()
    hidden, head, teacher_hidden, teacher_head, targets = linear_case()
    width = shard_width(world)
    x = hidden.requires_grad_()
    w = padded_shard(head.t(), width, rank, 0.0).t().contiguous().requires_grad_()
    v = padded_shard(teacher_head.t(), width, rank, 0.0).t().contiguous()
    heads = HeadPair(w, v, rank * width, VOCAB, group=dist.group.WORLD, chunk_rows=3)
    loss, _ = fused_linear_loss(
        x, teacher_hidden, targets, heads, lambda stats, rows: stats.reverse_kl * (1.0 + rows)
    )
    loss.backward()
    return {"loss": loss.detach(), "hidden": x.grad, "head": w.grad}


def linear_case():
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets = torch.randint(0, VOCAB, (7,), generator=generator)
    targets[3] = -100
    return draw(7, 5), draw(VOCAB, 5), draw(7, 6), draw(VOCAB, 6), targets


def steps_case(tokens: int = 60, trajectories: int = 4, steps: int = 5):
    generator = torch.Generator().manual_seed(7)
    student, teacher, targets = random_case(rows=tokens, vocab=VOCAB, padded=VOCAB, seed=9)
    step_ids = torch.randint(0, steps + 1, (tokens,), generator=generator)
    trajectory_ids = torch.randint(0, trajectories, (tokens,), generator=generator)
    return student, teacher, targets, step_ids, trajectory_ids, (trajectories, steps)


def steps_over_context_parallel() -> dict[str, torch.Tensor]:
    """Every rank holds some tokens of every step: d and w must come out as on one rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    student, teacher, targets, step_ids, trajectory_ids, (rows, steps) = steps_case()
    mine = torch.arange(len(targets)) % world == rank
    logits = student[mine].requires_grad_()
    loss, info = step_weighted_kl(
        logits,
        teacher[mine],
        targets[mine],
        step_ids[mine],
        trajectory_ids[mine],
        vocab_start=0,
        vocab_size=VOCAB,
        cp_group=dist.group.WORLD,
        num_trajectories=rows,
        max_steps=steps,
    )
    loss.sum().backward()
    return {
        "loss": loss.detach(),
        "d": info.step_divergence,
        "w": info.step_weights,
        "gradient": logits.grad,
    }


def megatron_cross_entropy() -> tuple[torch.Tensor, torch.Tensor]:
    """-logprob by megatron-core's vocab_parallel_cross_entropy, and ours, on the same shards."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    rank, world = dist.get_rank(), dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    generator = torch.Generator().manual_seed(3)
    vocab = 24 * world  # megatron does not mask padded columns: give it none
    logits = torch.randn(5, vocab, generator=generator) * 3
    targets = torch.randint(0, vocab, (5,), generator=generator)
    width = vocab // world
    shard = logits[:, rank * width : (rank + 1) * width].contiguous()
    ours = vocab_parallel_divergence(
        shard,
        None,
        targets,
        vocab_start=rank * width,
        vocab_size=vocab,
        group=parallel_state.get_tensor_model_parallel_group(),
    )
    # it works in place, on [sequence, batch, vocabulary]
    theirs = vocab_parallel_cross_entropy(shard.clone()[:, None], targets[:, None])[:, 0]
    parallel_state.destroy_model_parallel()
    return -theirs, ours.student_logprobs


def everything() -> dict:
    """One spawn per world size: processes are what a gloo test pays for."""
    return {
        "float64": op_on_shards(torch.float64),
        "bfloat16": op_on_shards(torch.bfloat16),
        "inplace": op_on_shards(torch.float64, inplace=True),
        "collectives": {
            "plain": counted_collectives(None, False),
            "jsd": counted_collectives(0.3, False),
            "precise": counted_collectives(0.3, True),
        },
        "fused_linear": fused_linear_on_shards(),
        "context_parallel": steps_over_context_parallel(),
        "megatron": megatron_cross_entropy(),
    }
