"""One rank of a small job under the watch: python -m tests.helpers.watched_rank RUN_DIR MISHAP.

Ranks all-reduce in a loop; rank 1 has the mishap at the third round. RANK, WORLD_SIZE and the
master's address come from the environment, as torchrun gives them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_sod.errors import RolloutError
from megatron_sod.parallel.status import STATUS
from megatron_sod.parallel.watch import Watch

STALL_TIMEOUT_S = 3.0


def mishap(kind: str) -> None:
    if kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "mismatch":
        dist.broadcast(torch.zeros(8, dtype=torch.int64), src=1)
    elif kind == "busy":
        time.sleep(600)
    elif kind == "patient":
        with STATUS.may_take(60):
            time.sleep(2 * STALL_TIMEOUT_S)
    elif kind == "own_error":
        raise RolloutError("the engine is on fire")


def main(run_dir: str, kind: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    watch = Watch(run_dir, stall_timeout_s=STALL_TIMEOUT_S)
    with contextlib.ExitStack() as closing:
        closing.callback(watch.close)
        closing.enter_context(watch.running())
        for number in range(1, 6):
            STATUS.iteration = number
            STATUS.enter("train")
            STATUS.at_micro_batch(1, 2)
            if number == 3 and dist.get_rank() == 1:
                time.sleep(1.0)  # records are shared a few times a second
                mishap(kind)
            dist.all_reduce(torch.ones(4))
    print(f"rank {dist.get_rank()} is done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
