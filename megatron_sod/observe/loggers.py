"""Where scalars go besides the terminal and metrics.jsonl: TensorBoard and wandb, when asked for.

Neither is imported unless it is asked for.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from megatron_sod.config.schema import SodConfig
from megatron_sod.errors import ConfigError


class Logger(Protocol):
    def log(self, iteration: int, scalars: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def open_loggers(config: SodConfig, run_dir: Path) -> list[Logger]:
    """The loggers `observe.loggers` names, beyond console and jsonl, which are always on.

    Raises:
        ConfigError: one is asked for whose package is not installed.
    """
    makers: dict[str, Callable[[SodConfig, Path], Logger]] = {
        "tensorboard": _TensorBoard,
        "wandb": _Wandb,
    }
    return [makers[name](config, run_dir) for name in config.observe.loggers if name in makers]


class _TensorBoard:
    """Event files under RUN/tensorboard."""

    def __init__(self, config: SodConfig, run_dir: Path):
        _import("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, iteration: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A wandb run in RUN/wandb. Without a network: WANDB_MODE=offline, the default here."""

    def __init__(self, config: SodConfig, run_dir: Path):
        wandb = _import("wandb", "wandb")
        self._run = wandb.init(
            project=config.observe.project,
            name=config.name,
            dir=str(run_dir),
            config=config.model_dump(mode="json"),
            mode=os.environ.get("WANDB_MODE", "offline"),
            resume="allow",
            id=run_dir.resolve().name.replace("/", "-"),
        )

    def log(self, iteration: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=iteration)

    def close(self) -> None:
        self._run.finish()


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"observe.loggers names {module}, which cannot be imported ({error}); run `pip install "
            f"{package}`, or take it out of observe.loggers (metrics.jsonl is always written)"
        ) from error
