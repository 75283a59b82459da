"""Checkpoints through Megatron's dist_checkpointing: atomic, resumable, a few kept.

RUN/checkpoints/iter_000010/       model, optimizer and progress
RUN/checkpoints/latest             "iter_000010"; written after the folder is complete
"""

from __future__ import annotations

import multiprocessing
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_sod.errors import CheckpointError
from megatron_sod.parallel.lifetime import die_with_parent
from megatron_sod.train.trainable import Trainable

# The default sharding of the distributed optimizer cannot be saved by dist_checkpointing 0.16.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
_LATEST = "latest"


@dataclass(frozen=True)
class Progress:
    """Where a run stands after an iteration."""

    iteration: int  # finished iterations
    policy_version: int  # optimizer-made versions of the student so far
    num_prompts_drawn: int  # position in the data order
    num_optimizer_steps: int
    config_hash: str


class Checkpoints:
    """The checkpoints of one run directory. Methods are collectives over all trainer ranks."""

    def __init__(self, folder: str | Path, *, keep_last: int):
        self.folder, self._keep_last = Path(folder), keep_last

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        marker = self.folder / _LATEST
        if not marker.is_file():
            return None
        path = self.folder / marker.read_text().strip()
        if not path.is_dir():
            raise CheckpointError(
                f"{marker} names {path.name}, which is not there; write the name of an existing "
                "iter_* folder into it, or delete it to start over"
            )
        return path

    def save(self, trainable: Trainable, progress: Progress) -> Path:
        """Write a checkpoint beside the older ones, then make it the latest."""
        target = self.folder / f"iter_{progress.iteration:06d}"
        partial = target.with_name(target.name + ".partial")
        if dist.get_rank() == 0:
            for stale in (partial, target):
                shutil.rmtree(stale, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        state = _sharded_state(trainable, is_loading=False)
        state["progress"] = asdict(progress)
        _start_result_queue()
        dist_checkpointing.save(state, str(partial))
        dist.barrier()
        if dist.get_rank() == 0:
            partial.rename(target)
            marker = self.folder / (_LATEST + ".partial")
            marker.write_text(target.name + "\n")
            marker.rename(self.folder / _LATEST)
            self._delete_old(keep=target)
        dist.barrier()
        return target

    def load(self, trainable: Trainable, path: str | Path) -> Progress:
        """Fill model and optimizer from a checkpoint folder.

        Raises:
            CheckpointError: the folder is not a checkpoint of this package.
        """
        if not (Path(path) / "metadata.json").is_file():
            raise CheckpointError(
                f"{path} is not a complete checkpoint (no metadata.json); give an iter_* folder of "
                "a run's checkpoints/"
            )
        _allocate_optimizer_state(trainable)
        state = _sharded_state(trainable, is_loading=True)
        loaded = dist_checkpointing.load(state, str(path))
        trainable.model.load_state_dict(loaded["model"], strict=False)
        trainable.optimizer.load_state_dict(loaded["optimizer"])
        _separate_step_counts(trainable)
        if "progress" not in loaded:
            raise CheckpointError(f"{path}: written by another program (no `progress` in it)")
        return Progress(**loaded["progress"])

    def _delete_old(self, *, keep: Path) -> None:
        complete = sorted(p for p in self.folder.glob("iter_*") if not p.name.endswith(".partial"))
        for path in complete[: -self._keep_last]:
            if path != keep:
                shutil.rmtree(path)


def _start_result_queue() -> None:
    """Megatron's writer keeps a manager process that would outlive a killed rank; ours dies with
    it."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(initializer=die_with_parent)
        filesystem_async._results_queue = manager.Queue()


def _allocate_optimizer_state(trainable: Trainable) -> None:
    """torch's AdamW has no state before its first step, and Megatron reads the step count from it.

    The zero-gradient step this takes may touch the weights; loading overwrites both.
    """
    for part in _parts(trainable):
        initialise = getattr(part, "_init_optimizer_states_with_dummy_values", None)
        if initialise is not None and not part.optimizer.state:
            initialise()
            part._set_main_param_and_optimizer_states = partial(_set_states, part)


def _set_states(part: Any, model_param: Any, tensors: dict) -> None:
    """Megatron 0.16 copies every entry of the optimizer's state, torch's `step` too, which its
    checkpoints keep in the parameter groups instead; it has been restored from there."""
    group, order = part.model_param_group_index_map[model_param]
    state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
    if "step" in state:
        tensors = {**tensors, "step": state["step"]}
    type(part)._set_main_param_and_optimizer_states(part, model_param, tensors)


def _separate_step_counts(trainable: Trainable) -> None:
    """Megatron restores one `step` tensor for all parameters; AdamW would count it up once per
    parameter."""
    for part in _parts(trainable):
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def _parts(trainable: Trainable) -> list[Any]:
    return getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer])


def _sharded_state(trainable: Trainable, *, is_loading: bool) -> dict:
    model_state = trainable.model.sharded_state_dict(metadata=_METADATA)
    optimizer_state = trainable.optimizer.sharded_state_dict(
        model_state, is_loading=is_loading, metadata=_METADATA
    )
    return {"model": model_state, "optimizer": optimizer_state}
