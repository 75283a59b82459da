"""Which rank does what: Megatron's coordinates of every trainer rank, and the engines' GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sod.config.schema import ClusterConfig, ParallelConfig, RolloutConfig


@dataclass(frozen=True)
class Role:
    """One trainer rank. Megatron numbers tensor ranks fastest, then context, data, pipeline."""

    rank: int
    node: int
    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    teacher_pp: int
    engine: int | None  # the engine that shares this GPU; None when engines have their own


def data_parallel_size(world_size: int, parallel: ParallelConfig) -> int:
    """Replicas of the model, context-parallel ranks not counted."""
    return world_size // parallel.model_parallel_size


def trainer_roles(
    cluster: ClusterConfig,
    student: ParallelConfig,
    teacher: ParallelConfig | None = None,
    rollout: RolloutConfig | None = None,
) -> list[Role]:
    """Every trainer rank in order."""
    roles = []
    for rank in range(cluster.world_size):
        tp, cp, dp, pp = coordinates(rank, cluster.world_size, student)
        roles.append(
            Role(
                rank=rank,
                node=rank // cluster.gpus_per_node,
                tp=tp,
                cp=cp,
                dp=dp,
                pp=pp,
                ep=_expert_rank(rank, student),
                teacher_pp=coordinates(rank, cluster.world_size, teacher)[3] if teacher else 0,
                engine=_engine_of(rank, rollout),
            )
        )
    return roles


def coordinates(rank: int, world_size: int, parallel: ParallelConfig) -> tuple[int, int, int, int]:
    """(tensor, context, data, pipeline) rank of a global rank."""
    tp_size, cp_size = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    dp_size = data_parallel_size(world_size, parallel)
    rest, tp = divmod(rank, tp_size)
    rest, cp = divmod(rest, cp_size)
    pp, dp = divmod(rest, dp_size)
    return tp, cp, dp, pp


def _expert_rank(rank: int, parallel: ParallelConfig) -> int:
    """Experts spread over the ranks that follow each other, outside of each expert's own split."""
    return rank // expert_tensor_size(parallel) % parallel.expert_model_parallel_size


def expert_tensor_size(parallel: ParallelConfig) -> int:
    """Ranks that share the tensors of one expert."""
    return parallel.expert_tp_size


def _engine_of(rank: int, rollout: RolloutConfig | None) -> int | None:
    if rollout is None or rollout.placement == "disaggregated":
        return None
    engine = rank // rollout.engine.tensor_parallel_size
    return engine if engine < rollout.engine.num_engines else None


def engine_gpus(rollout: RolloutConfig) -> int:
    """GPUs all engines take together."""
    return rollout.engine.num_engines * rollout.engine.tensor_parallel_size
