"""The driver's side of rollouts, on rank 0: starts Ray, engines and workers, talks to them."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

import ray

from megatron_sod.config.schema import EngineConfig, ModelConfig, SodConfig
from megatron_sod.errors import RolloutError
from megatron_sod.observe.progress import say
from megatron_sod.reshard.sync import EngineControl
from megatron_sod.rollout.engine import Engine, engine_environment
from megatron_sod.rollout.worker import RolloutWorker
from megatron_sod.types import Prompt, Trajectory

_TRANSFER_TIMEOUT_S = 300
_ENGINE_CALLS_AT_ONCE = 4096


class RolloutController:
    """Engines and a rollout worker for one model."""

    def __init__(self, config: SodConfig, model: ModelConfig, *, load_weights: bool):
        """Begins to start everything and returns; `wait_until_ready` blocks.

        Args:
            model: student or teacher.
            load_weights: False leaves random weights, for engines that get theirs by transfer.
        """
        start_ray()
        self._config = config
        options = _engine_options(config, model, load_weights)
        remote_engine = ray.remote(  # type: ignore[call-overload]
            num_cpus=0,
            max_concurrency=_ENGINE_CALLS_AT_ONCE,
            runtime_env=_engine_runtime(config.rollout.engine),
        )(Engine)
        remote_worker = ray.remote(  # type: ignore[call-overload]
            num_cpus=0, max_concurrency=8
        )(RolloutWorker)
        self.engines = [
            remote_engine.remote(options) for _ in range(config.rollout.engine.num_engines)
        ]
        self._worker = remote_worker.remote(config, self.engines)

    def wait_until_ready(self, what: str) -> None:
        """Block until engines and worker answer.

        Raises:
            RolloutError: one failed to start, or not within rollout.engine.start_timeout_s.
        """
        started = time.monotonic()
        pending = [engine.ready.remote() for engine in self.engines]
        level = self._worker.sandbox_level.remote()
        self._get([*pending, level], self._config.rollout.engine.start_timeout_s, f"{what} start")
        say(
            f"{what}: {len(self.engines)} engine(s) ready after {time.monotonic() - started:.0f} s,"
            f" sandbox level {ray.get(level)}"
        )

    def rollout(
        self,
        prompts: list[Prompt],
        *,
        tag: str,
        num_generations: int,
        temperature: float,
        top_p: float,
    ) -> list[Trajectory]:
        """`num_generations` graded trajectories of each prompt, in prompt order."""
        result = self._worker.rollout.remote(
            prompts,
            tag=tag,
            num_generations=num_generations,
            temperature=temperature,
            top_p=top_p,
            seed=self._config.seed,
        )
        return self._get(result, self._config.rollout.timeout_s, f"rollout {tag}")

    def engine_control(self) -> EngineControl:
        """What a weight transfer asks of the engines."""

        def connect(info: dict) -> None:
            calls = [engine.connect_weights.remote(info) for engine in self.engines]
            self._get(calls, _TRANSFER_TIMEOUT_S, "weight transfer set-up")

        def update(info: dict, version: int) -> None:
            calls = [engine.update_weights.remote(info, version) for engine in self.engines]
            self._get(calls, _TRANSFER_TIMEOUT_S, f"weight transfer {version}")

        def score(canaries: list[list[int]]) -> list[list[list[float]]]:
            calls = [[engine.score.remote(ids) for ids in canaries] for engine in self.engines]
            return [self._get(row, _TRANSFER_TIMEOUT_S, "canary scoring") for row in calls]

        return EngineControl(connect, update, score)

    def close(self) -> None:
        """End engines, worker and their processes."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._worker.close.remote(), timeout=10)
        for engine in self.engines:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(engine.close.remote(), timeout=20)
        for actor in (self._worker, *self.engines):
            ray.kill(actor)

    def _get(self, references: Any, timeout_s: float, what: str) -> Any:
        try:
            return ray.get(references, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise RolloutError(
                f"{what}: no answer within {timeout_s:.0f} s; see the engines' logs under "
                f"{_log_folder()}, or raise the timeout in `rollout`"
            ) from error
        except ray.exceptions.RayTaskError as error:
            raise RolloutError(f"{what} failed in a worker: {error.cause!r}") from error
        except ray.exceptions.RayError as error:
            raise RolloutError(
                f"{what}: a worker process died ({error}); see its log under {_log_folder()}"
            ) from error


def start_ray() -> None:
    """Join RAY_ADDRESS when it is set, else start a local instance; a second call does nothing."""
    if ray.is_initialized():
        return
    # Ray lowers its workers' priority by default; engines would starve beside anything else.
    os.environ.setdefault("RAY_worker_niceness", "0")
    with _without_torchrun_variables():
        ray.init(
            address=os.environ.get("RAY_ADDRESS"),
            include_dashboard=False if "RAY_ADDRESS" not in os.environ else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="megatron_sod",
        )


def stop_ray() -> None:
    """Leave Ray; a local instance ends with all its processes."""
    if ray.is_initialized():
        ray.shutdown()


@contextlib.contextmanager
def _without_torchrun_variables() -> Iterator[None]:
    """Ray's processes inherit this environment, and vLLM would take RANK and MASTER_ADDR for its
    own."""
    names = [
        n
        for n in os.environ
        if n in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
        or n.startswith(("MASTER_", "TORCHELASTIC_", "ROLE_", "GROUP_"))
    ]
    held = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(held)


def _engine_runtime(engine: EngineConfig) -> dict[str, Any]:
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


def _engine_options(config: SodConfig, model: ModelConfig, load_weights: bool) -> dict[str, Any]:
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
    }


def _log_folder() -> str:
    node = ray._private.worker._global_node
    return f"{node.get_session_dir_path()}/logs" if node else "the Ray session directory"
