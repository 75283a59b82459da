"""Which GPUs of which machine each engine gets. torchrun owns the trainers' GPUs, and Ray counts
none: without a list of its own every engine would take the machine's first GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sod.config.schema import ClusterConfig, RolloutConfig
from megatron_sod.errors import ConfigError


@dataclass(frozen=True)
class EnginePlace:
    """Where one engine lives."""

    machine: int  # of the job, in torchrun's order
    devices: tuple[int, ...]  # its GPUs there, one per tensor-parallel worker

    def visible_devices(self, trainer_gpus: int, names: Sequence[str] = ()) -> str:
        """CUDA_VISIBLE_DEVICES of its processes: its own GPUs first, which vLLM takes, then those
        of the machine's trainers, whose memory it maps when weights come by CUDA IPC.

        Args:
            trainer_gpus: trainer ranks on the machine, one GPU each, from the first on.
            names: what this machine calls its GPUs, if a CUDA_VISIBLE_DEVICES renumbers them.
        """
        order = [*self.devices, *(i for i in range(trainer_gpus) if i not in self.devices)]
        missing = [device for device in order if names and device >= len(names)]
        if missing:
            raise ConfigError(
                f"CUDA_VISIBLE_DEVICES lists {len(names)} GPUs, trainers and engines need GPU "
                f"{max(missing)} too, counted from 0; list more, or lower "
                "rollout.engine.num_engines"
            )
        return ",".join(names[device] if names else str(device) for device in order)


def engine_places(cluster: ClusterConfig, rollout: RolloutConfig) -> list[EnginePlace]:
    """One place per engine: on the trainers' GPUs (colocated), or on those that follow them on
    every machine (disaggregated).

    Raises:
        ConfigError: an engine does not fit on a machine, or there are more than fit beside the
            trainers.
    """
    size, count = rollout.engine.tensor_parallel_size, rollout.engine.num_engines
    if rollout.placement == "disaggregated":
        per_machine, first = -(-count // cluster.num_nodes), cluster.gpus_per_node
    else:
        per_machine, first = cluster.gpus_per_node // size, 0
        if count > per_machine * cluster.num_nodes:
            raise ConfigError(
                f"{count} colocated engines of {size} GPUs do not fit on {cluster.num_nodes} "
                f"machine(s) of {cluster.gpus_per_node} GPUs; lower rollout.engine.num_engines or "
                "tensor_parallel_size (an engine stays on one machine)"
            )
    places = []
    for engine in range(count):
        machine, position = divmod(engine, per_machine)
        start = first + position * size
        places.append(EnginePlace(machine, tuple(range(start, start + size))))
    return places
