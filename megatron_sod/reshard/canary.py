"""Fixed token sequences whose logprobs the trainer and the engines must agree on."""

from __future__ import annotations

import random

import torch.distributed as dist

from megatron_sod.data.packing import PackItem, alignment_of, pack
from megatron_sod.model.gpt import PipelineModel
from megatron_sod.parallel.state import is_last_stage
from megatron_sod.scoring.score import score

NUM_CANARIES = 2


def canary_sequences(vocab_size: int, length: int) -> list[list[int]]:
    """Token sequences that touch the whole vocabulary's range; the same in every run."""
    rng = random.Random(20_240_501)
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(NUM_CANARIES)]


def trainer_logprobs(model: PipelineModel, sequences: list[list[int]]) -> list[list[float]]:
    """Logprobs of each sequence's tokens but the first, on every rank. A collective."""
    items = [
        PackItem(ids, [True] * len(ids), [1] * len(ids), [0.0] * len(ids), index)
        for index, ids in enumerate(sequences)
    ]
    groups = model.pg_collection
    batch = pack(items, alignment_of(model.config))
    scores = score(model, None, [batch], temperature=1.0)
    mine = None
    if is_last_stage(groups) and groups.tp.rank() == 0 and groups.dp_cp.rank() == 0:
        flat = scores[0].student_logprobs.float().cpu()
        mine = [flat[batch.trajectory_ids == i].tolist() for i in range(len(sequences))]
    offers: list = [None] * dist.get_world_size()
    dist.all_gather_object(offers, mine)
    return next(offer for offer in offers if offer is not None)
