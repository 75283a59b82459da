"""Ray itself: joined or started, left, and what its errors mean to us."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

import ray

from megatron_sod.errors import RolloutError
from megatron_sod.parallel.status import STATUS

CALLS_AT_ONCE = 4096  # to one actor: a call per trajectory
_LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
)


class ActorLost(RolloutError):
    """The process a call was made to is gone, and the call's result with it."""


def start_ray() -> None:
    """Join RAY_ADDRESS when it is set, else start a local instance; a second call does nothing."""
    if ray.is_initialized():
        return
    # Ray lowers its workers' priority by default; engines would starve beside anything else.
    os.environ.setdefault("RAY_worker_niceness", "0")
    with _without_torchrun_variables(), _in_a_session_of_its_own():
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


def on_machine(host: str) -> Any:
    """Scheduling strategy of an actor that must live on this host.

    Raises:
        RolloutError: no living Ray node has that name.
    """
    nodes = {node["NodeManagerHostname"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    if host not in nodes:
        raise RolloutError(
            f"engines belong on {host}, which is not in the Ray cluster ({', '.join(sorted(nodes))}"
            "); start `ray start --address` on every machine torchrun runs on, with the same names"
        )
    return ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(nodes[host], soft=False)


def get(references: Any, timeout_s: float, what: str) -> Any:
    """Results of calls to actors.

    Raises:
        ActorLost: an actor died.
        RolloutError: a call failed, or there was no answer in time.
    """
    try:
        with STATUS.may_take(timeout_s):
            return ray.get(references, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise RolloutError(
            f"{what}: no answer within {timeout_s:.0f} s; see the engines' logs under "
            f"{log_folder()}, or raise the timeout in `rollout`"
        ) from error
    except ray.exceptions.RayTaskError as error:
        raise RolloutError(f"{what} failed in a worker: {error.cause!r}") from error
    except _LOST as error:
        raise ActorLost(
            f"{what}: a worker process died ({error}); see its log under {log_folder()}"
        ) from error
    except ray.exceptions.RayError as error:
        raise RolloutError(f"{what}: Ray failed: {error}") from error


def log_folder() -> str:
    """Where the actors' output goes."""
    node = ray._private.worker._global_node
    return f"{node.get_session_dir_path()}/logs" if node else "the Ray session directory"


@contextlib.contextmanager
def _in_a_session_of_its_own() -> Iterator[None]:
    """torchrun passes signals on to the rank's whole process group; a request to stop after the
    iteration would end Ray at once. Ray's processes still die with this one."""
    services: Any = ray._private.services
    popen = services.ConsolePopen
    services.ConsolePopen = functools.partial(popen, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = popen


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
