"""An engine as a Ray actor: where and with what it starts, and how a worker calls it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import ray
import torch

from megatron_sod.config.schema import EngineConfig, ModelConfig, SodConfig
from megatron_sod.errors import EngineLost, RolloutError
from megatron_sod.rollout.agent_loop import SampledTurn, Sampling
from megatron_sod.rollout.engine import Engine, engine_environment
from megatron_sod.rollout.placement import engine_places
from megatron_sod.rollout.ray_instance import CALLS_AT_ONCE, on_machine

_UNREACHABLE_PAUSE_S = 1.0


class RayEngine:
    """An Engine actor as a worker sees it."""

    def __init__(self, actor: Any):
        self._actor = actor

    async def generate(self, token_ids: list[int], sampling: Sampling) -> SampledTurn:
        """As Engine.generate.

        Raises:
            EngineLost: the actor's process, or vLLM's core in it, is dead.
        """
        while True:
            call = self._actor.generate.remote(token_ids, sampling)
            try:
                return await call
            except asyncio.CancelledError:
                ray.cancel(call)  # a trajectory out of time must not keep the engine busy
                raise
            except ray.exceptions.ActorUnavailableError:  # the network, not the actor
                await asyncio.sleep(_UNREACHABLE_PAUSE_S)
            except ray.exceptions.RayActorError as error:
                raise EngineLost(str(error).strip().splitlines()[0]) from None
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, EngineLost):
                    raise EngineLost(str(error.cause)) from None
                raise


def start_engine(
    config: SodConfig, options: dict[str, Any], index: int, machines: Sequence[str]
) -> Any:
    """Begin to start engine `index`; its actor. `options`: as Engine; `machines`: of the job."""
    kind = ray.remote(  # type: ignore[call-overload]
        num_cpus=0, max_concurrency=CALLS_AT_ONCE, **_place_of(config, index, machines)
    )(Engine)
    return kind.remote(options)


def _place_of(config: SodConfig, index: int, machines: Sequence[str]) -> dict[str, Any]:
    """Environment, machine and GPUs of an engine's actor."""
    runtime = engine_runtime(config.rollout.engine)
    options: dict[str, Any] = {"runtime_env": runtime}
    if torch.cuda.is_available():
        cluster = config.cluster
        place = engine_places(cluster, config.rollout)[index]
        names = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        runtime["env_vars"]["CUDA_VISIBLE_DEVICES"] = place.visible_devices(
            cluster.gpus_per_node, names.split(",") if names else ()
        )
        if machines:
            options["scheduling_strategy"] = on_machine(machines[place.machine])
    return options


def engine_runtime(engine: EngineConfig) -> dict[str, Any]:
    """Ray's runtime environment of an engine: vLLM may live beside another torch than ours."""
    runtime: dict[str, Any] = {"env_vars": engine_environment(engine.kv_cache_gb)}
    python = engine.py_executable or os.environ.get("SOD_ENGINE_PYTHON")
    if python:
        if not os.access(python, os.X_OK):
            raise RolloutError(
                f"rollout.engine.py_executable {python!r} is not an executable Python; give the "
                "bin/python of the environment vLLM is installed in, or unset SOD_ENGINE_PYTHON"
            )
        runtime["py_executable"] = python
    return runtime


def engine_options(
    config: SodConfig, model: ModelConfig, load_weights: bool, vocab_size: int | None
) -> dict[str, Any]:
    """What every engine of this model starts with; see Engine."""
    rollout, engine = config.rollout, config.rollout.engine
    return {
        "model": os.path.abspath(model.path),
        "dtype": model.dtype if engine.dtype == "auto" else engine.dtype,
        "max_model_len": rollout.max_prompt_length + rollout.max_response_length,
        "max_num_seqs": engine.max_num_seqs,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "gpu_memory_utilization": engine.gpu_memory_utilization,
        "load_format": "auto" if load_weights else "dummy",
        "seed": config.seed,
        "transfer_backend": config.transfer.backend,
        "vocab_size": vocab_size,
    }
