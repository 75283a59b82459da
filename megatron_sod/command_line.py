"""What the training command lines share: arguments, `--print-config`, `--dry-run`, errors as one
line."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import traceback as tracing
import warnings
from collections.abc import Callable

from pydantic import BaseModel

from megatron_sod.config.load import to_yaml
from megatron_sod.errors import ConfigError, PeerFailed, SodError

_PATIENCE_S = 8.0
_PEER_PATIENCE_S = 60.0


def run_training(doc: str | None, load: Callable[..., BaseModel], entry: str) -> None:
    """Parse, load the configuration, and call `entry` ("module:function") with it.

    The entry is imported late, so that `--print-config` and configuration errors are quick.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("--print-config", action="store_true", help="resolve, print, and stop")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print roles, memory, traffic and times; start nothing (plain python, no GPUs)",
    )
    parser.add_argument("overrides", nargs="*", help="dotted key=value")
    arguments = parser.parse_args()
    with user_errors():
        config = load(arguments.config, arguments.overrides)
        if arguments.print_config:
            print(to_yaml(config), end="")
            return
        if arguments.dry_run:
            entry = "megatron_sod.plan.dry_run:dry_run"
        else:
            check_launch(config.cluster.world_size)  # type: ignore[attr-defined]
        # Megatron says at every import what it does without Transformer-Engine and Apex; the
        # doctor says it once.
        warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.")
        module, _, function = entry.partition(":")
        getattr(importlib.import_module(module), function)(config)


def check_launch(world_size: int) -> None:
    """Raises ConfigError unless torchrun started as many ranks as the configuration counts on."""
    started = os.environ.get("WORLD_SIZE")
    launch = f"torchrun --standalone --nproc-per-node {world_size} {sys.argv[0]} --config ..."
    if started is None:
        raise ConfigError(f"this was not started by torchrun, so there are no ranks; use: {launch}")
    if int(started) != world_size:
        raise ConfigError(
            f"torchrun started {started} ranks, but cluster.num_nodes x cluster.gpus_per_node is "
            f"{world_size}; change cluster.gpus_per_node, or use: {launch}"
        )


class user_errors:
    """Shows a SodError as one message and exits with 1; anything else keeps its traceback.

    Ranks other than 0 wait first: when rank 0 failed for the same reason, torchrun ends them and
    the message appears once. A rank always ends at once: closing NCCL's groups on the way out
    would wait for the other ranks.
    """

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, traceback) -> None:
        if not isinstance(error, SodError):
            if isinstance(error, Exception) and "RANK" in os.environ:
                tracing.print_exception(error)
                sys.stderr.flush()
                sys.stdout.flush()
                os._exit(1)
            return
        rank = os.environ.get("RANK", "0")
        prefix = "error"
        if rank != "0":
            time.sleep(_PEER_PATIENCE_S if isinstance(error, PeerFailed) else _PATIENCE_S)
            prefix = f"error (rank {rank})"
        print(f"{prefix}: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # other threads and half-open process groups must not keep the rank alive
