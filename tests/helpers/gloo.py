"""Run a function on several CPU ranks over gloo and collect what each returns."""

from __future__ import annotations

import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
# Imported once by the process all ranks are forked from: Megatron takes seconds to import.
PRELOADED = ["torch", "megatron_sod.train.trainable", "megatron_sod.scoring.score"]


def free_port() -> int:
    """A loopback TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    folder: str,
    environment: dict[str, str],
    fn: Callable,
    args: tuple,
):
    os.environ.clear()  # the fork server keeps the environment of its own start
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    try:
        result: Any = ("ok", fn(*args))
    except BaseException:
        result = ("error", traceback.format_exc())
    torch.save(result, Path(folder) / f"{rank}.pt")
    if result[0] == "error":
        os._exit(1)  # peers may wait in a collective; do not join them in the barrier below
    dist.barrier()
    dist.destroy_process_group()


def run_on_ranks(world_size: int, fn: Callable, *args: Any) -> list[Any]:
    """Call `fn(*args)` on `world_size` gloo ranks; return the results in rank order.

    `fn` must be importable (module level). A failure on any rank raises with its traceback. Ranks
    see no GPU, whatever the machine has: gloo and Megatron on CPU are what they test.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        port, environment = free_port(), {**os.environ, **NO_GPU}
        ranks = [
            context.Process(
                target=_rank_main, args=(rank, world_size, port, folder, environment, fn, args)
            )
            for rank in range(world_size)
        ]
        with mock.patch.dict(os.environ, NO_GPU):  # the first start starts the fork server, too
            for process in ranks:
                process.start()
        results = []
        failures = []
        for rank, process in enumerate(ranks):
            process.join(timeout=280)
            path = Path(folder) / f"{rank}.pt"
            if process.is_alive():
                process.kill()
                process.join()
            status, value = (
                torch.load(path, weights_only=False) if path.exists() else ("error", "no result")
            )
            if status == "error":
                failures.append(f"rank {rank} (exit {process.exitcode}):\n{value}")
            results.append(value)
        if failures:
            raise AssertionError("\n".join(failures))
        return results
