"""The same run on more GPUs, on paper: colocated or apart, strictly on-policy or one behind."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_sod.config.schema import SodConfig
from megatron_sod.plan.roles import engine_gpus
from megatron_sod.plan.simulate import IterationTimes, simulate

SPLITS = (1, 2, 3, 4, 5, 6, 7)  # eighths of the GPUs that train, when engines have their own
VARIANTS = (("colocated", 0), ("disaggregated", 0), ("disaggregated", 1))


def what_if(
    config: SodConfig, gpu_counts: list[int], *, grow_batch: bool
) -> Iterator[IterationTimes]:
    """Every variant at every number of GPUs; with engines apart, the fastest split.

    Args:
        grow_batch: the batch grows with the GPUs; else it stays.
    """
    for num_gpus in gpu_counts:
        for placement, staleness in VARIANTS:
            found = [
                simulate(variant, num_iterations=1, staleness=staleness)
                for variant in _variants(config, num_gpus, placement, grow_batch)
            ]
            if found:
                yield min(found, key=lambda times: times.step_s)


def _variants(
    config: SodConfig, num_gpus: int, placement: str, grow_batch: bool
) -> Iterator[SodConfig]:
    parallel = config.student.parallel.model_parallel_size
    if config.teacher is not None:
        parallel = max(parallel, config.teacher.parallel.model_parallel_size)
    if placement == "colocated":
        if num_gpus % parallel == 0:
            yield resized(config, num_gpus, num_gpus, placement, grow_batch)
        return
    trainers = {num_gpus * split // 8 // parallel * parallel for split in SPLITS}
    for count in sorted(trainers - {0}):
        if num_gpus - count >= config.rollout.engine.tensor_parallel_size:
            yield resized(config, count, num_gpus - count, placement, grow_batch)


def resized(
    config: SodConfig, num_trainers: int, num_engine_gpus: int, placement: str, grow_batch: bool
) -> SodConfig:
    """The configuration on another number of GPUs. Not validated: it is simulated, never run."""
    per_node = min(config.cluster.gpus_per_node, num_trainers)
    while num_trainers % per_node:
        per_node -= 1
    engine = config.rollout.engine
    num_engines = max(1, num_engine_gpus // engine.tensor_parallel_size)
    total = num_trainers + (num_engine_gpus if placement == "disaggregated" else 0)
    factor = total / max(config.cluster.world_size, 1) if grow_batch else 1.0
    train = config.train
    cluster = config.cluster.model_copy(
        update={"num_nodes": num_trainers // per_node, "gpus_per_node": per_node}
    )
    rollout = config.rollout.model_copy(
        update={
            "placement": placement,
            "engine": engine.model_copy(update={"num_engines": num_engines}),
        }
    )
    batch = {
        "train_batch_size": max(1, round(train.train_batch_size * factor)),
        "ppo_mini_batch_size": max(1, round(train.ppo_mini_batch_size * factor)),
    }
    return config.model_copy(
        update={"cluster": cluster, "rollout": rollout, "train": train.model_copy(update=batch)}
    )


def gpus_of(config: SodConfig) -> int:
    """GPUs the configuration uses, engines' own included."""
    own = engine_gpus(config.rollout) if config.rollout.placement == "disaggregated" else 0
    return config.cluster.world_size + own
