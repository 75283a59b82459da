"""Where scalars go besides the terminal and metrics.jsonl: TensorBoard and wandb, when asked for.

Both get our names and, beside them, the reference's where a scalar exists there under another, so
that dashboards made for it go on working. Neither is imported unless it is asked for.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from megatron_sod.config.schema import SodConfig
from megatron_sod.errors import ConfigError

# reference name: ours. Its token_kl is teacher - student, minus the k1 estimate of the KL.
REFERENCE_NAMES = {
    "actor/entropy": "actor/student_entropy",
    "actor/pg_loss": "actor/loss",
    "actor/token_kl/max": "sod/r_max",
    "actor/token_kl/min": "sod/r_min",
    "actor/token_kl/std": "sod/r_std",
    "critic/score/mean": "rollout/score_mean",
    "critic/rewards/mean": "rollout/reward_mean",
    "critic/rewards/max": "rollout/reward_max",
    "critic/rewards/min": "rollout/reward_min",
    "critic/advantages/mean": "actor/advantage",
    "response_length/mean": "rollout/response_length",
    "response_length/clip_ratio": "rollout/truncated_rate",
    "prompt_length/mean": "rollout/prompt_length",
    "rollout/tool_success_rate": "tool/ok_rate",
    "perf/total_num_tokens": "rollout/tokens",
    "perf/time_per_step": "time/total_s",
    "timing_s/gen": "time/rollout_s",
    "timing_s/ref": "time/score_s",
    "timing_s/update_actor": "time/train_s",
    "timing_s/save_checkpoint": "time/save_s",
    "timing_s/testing": "time/eval_s",
    "timing_s/step": "time/total_s",
    "training/global_step": "iteration",
}


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


def with_reference_names(scalars: dict[str, float]) -> dict[str, float]:
    """The scalars, and those the reference knows under their names there as well."""
    extra = {name: scalars[ours] for name, ours in REFERENCE_NAMES.items() if ours in scalars}
    if "actor/kl_k1" in scalars:
        extra["actor/token_kl/mean"] = -scalars["actor/kl_k1"]
    if "rollout/num_turns" in scalars:  # it counts user turns and one more
        extra["num_turns/mean"] = 2 * scalars["rollout/num_turns"]
    return {**extra, **scalars}


def evaluation_scalars(result: dict[str, Any]) -> dict[str, float]:
    """An evaluation under our name and the reference's."""
    name = "tasks" if result["model"] == "student" else result["model"]
    samples = max(1, round(result["num_samples"] / max(result["num_prompts"], 1)))
    return {
        f"eval/{result['model']}_success": result["success"],
        f"val-core/{name}/acc/mean@{samples}": result["success"],
        f"eval/{result['model']}_tool_calls": result["tool_calls_per_trajectory"],
    }


class _TensorBoard:
    """Event files under RUN/tensorboard."""

    def __init__(self, config: SodConfig, run_dir: Path):
        _import("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, iteration: int, scalars: dict[str, float]) -> None:
        for name, value in with_reference_names(scalars).items():
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
        self._run.log(with_reference_names(scalars), step=iteration)

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
