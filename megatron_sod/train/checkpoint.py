"""Checkpoints through Megatron's dist_checkpointing: written while training goes on, atomic.

RUN/checkpoints/iter_000010/       what `checkpoint_files` lists, and the tensors of every rank
RUN/checkpoints/latest             "iter_000010"; changed only after the folder is complete
RUN/checkpoints/best               the one whose evaluation was best; kept whatever its age
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from megatron.core import dist_checkpointing, parallel_state

from megatron_sod.config.compare import changes
from megatron_sod.convert.hf_files import copy_side_files
from megatron_sod.errors import CheckpointError
from megatron_sod.parallel.cpu import device
from megatron_sod.train import checkpoint_files as files
from megatron_sod.train.async_save import SaveUnderWay
from megatron_sod.train.checkpoint_state import (
    apply_random_state,
    apply_state,
    sharded_random_state,
    sharded_state,
)
from megatron_sod.train.trainable import Trainable

_CLOSE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Progress:
    """Where a run stands after an iteration. New fields need defaults, for older checkpoints."""

    iteration: int  # finished iterations
    policy_version: int  # optimizer-made versions of the student so far
    num_prompts_drawn: int  # position in the data order
    num_optimizer_steps: int
    config_hash: str
    best_success: float | None = None  # of the student's evaluations so far
    best_iteration: int | None = None


@dataclass(frozen=True)
class Description:
    """What travels with the tensors for people and for the checks on resume."""

    config: dict[str, Any] = field(default_factory=dict)  # resolved
    versions: dict[str, str] = field(default_factory=dict)
    model_dir: str | None = None  # its configuration and tokenizer: enough to convert a checkpoint


class Checkpoints:
    """The checkpoints of one run directory. The constructor, `save` and `load` are collectives over
    all trainer ranks."""

    def __init__(
        self, folder: str | Path, *, keep_last: int, description: Description | None = None
    ):
        self.folder, self._keep_last = Path(folder), keep_last
        self._description = description or Description()
        self._group = dist.new_group(backend="gloo")  # for the writing threads alone
        self._pending: SaveUnderWay | None = None
        self._target: Path | None = None

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return files.marked(self.folder, files.LATEST)

    def save(
        self,
        trainable: Trainable,
        progress: Progress,
        write_more: Callable[[Path], None] | None = None,
    ) -> None:
        """Copy the state and return; the checkpoint appears once every rank has written.

        An earlier save is waited for first. `write_more`, on rank 0, may put files of its own into
        the folder; they are sealed with the rest.
        """
        self.finish()
        self._target = self.folder / files.folder_name(progress.iteration)
        partial = self._target.with_suffix(".partial")
        _together(lambda: self._prepare(partial, write_more), "prepared", partial)
        about = {
            "format": files.FORMAT,
            "format_version": files.FORMAT_VERSION,
            "progress": asdict(progress),
            "layout": _layout(),
            "model": asdict(trainable.geometry),
            "versions": self._description.versions,
        }
        state = sharded_state(trainable, is_loading=False)
        state["random_state"] = sharded_random_state()
        self._pending = SaveUnderWay(
            state, partial, self._group, lambda sums: self._publish(partial, about, sums)
        )

    @property
    def is_writing(self) -> bool:
        return self._pending is not None and not self._pending.is_done

    @property
    def has_failed(self) -> bool:
        """Whether a save is known to have failed; `finish` says why. Ranks may learn it one after
        another."""
        return self._pending is not None and self._pending.problem is not None

    def finish(self, timeout_s: float | None = None) -> None:
        """Wait for the checkpoint being written.

        Raises:
            CheckpointError: it could not be written; the earlier ones are untouched.
        """
        if self._pending is None:
            return
        self._pending.wait(timeout_s)
        if not self._pending.is_done:
            return
        problem, self._pending = self._pending.problem, None
        if problem is not None:
            raise CheckpointError(self._not_written(problem))

    def load(self, trainable: Trainable, path: str | Path) -> Progress:
        """Fill model, optimizer and generators from a checkpoint folder, in any layout.

        Raises:
            CheckpointError: not a checkpoint of this package or model, or a file is damaged.
        """
        path = Path(path)
        about = _together(lambda: files.read_about(path), "read", path, everywhere=True)
        rank, world = dist.get_rank(), dist.get_world_size()
        _together(
            lambda: files.verify_files(path, part=rank, num_parts=world),
            "read",
            path,
            everywhere=True,
        )
        _check_model(about, trainable, path)
        progress = _progress_from(about["progress"], path)
        state = sharded_state(trainable, is_loading=True)
        same_layout = about["layout"] == _layout()
        if same_layout:
            state["random_state"] = sharded_random_state()
        try:
            loaded = dist_checkpointing.load(state, str(path))
        except Exception as error:
            raise CheckpointError(
                f"{path}: its tensors do not fit this model ({type(error).__name__}: {error}); it "
                "was written with another architecture or release"
            ) from error
        apply_state(trainable, loaded)
        if same_layout:
            apply_random_state(loaded["random_state"])
        if rank == 0 and path.resolve().parent == self.folder.resolve():
            files.mark(self.folder, files.LATEST, path)
        return progress

    def changes_since(self, path: str | Path) -> list[str]:
        """What differs between the stored and the present configuration and versions."""
        stored = yaml.safe_load((Path(path) / files.CONFIG).read_text()) or {}
        versions = files.read_about(Path(path))["versions"]
        return [
            *changes(stored, self._description.config),
            *(f"version of {line}" for line in changes(versions, self._description.versions)),
        ]

    def close(self) -> None:
        """On the way out after an error: let a checkpoint being written appear if it can."""
        with contextlib.suppress(CheckpointError):
            self.finish(_CLOSE_TIMEOUT_S)

    def _prepare(self, partial: Path, write_more: Callable[[Path], None] | None) -> None:
        """A folder with what the caller adds to it; leftovers of killed saves go."""
        for stale in self.folder.glob("iter_*.partial"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
        if write_more is not None:
            write_more(partial)

    def _publish(self, partial: Path, about: dict[str, Any], sums: files.FileSums) -> None:
        """Describe and seal the written folder, then make it the latest. Runs in the thread."""
        files.write_json(partial / files.ABOUT, about)
        (partial / files.CONFIG).write_text(yaml.safe_dump(self._description.config))
        if self._description.model_dir is not None:
            copy_side_files(self._description.model_dir, partial)
        files.write_checksums(partial, sums)
        target = partial.with_suffix("")
        if target.exists():  # newer than what the run was resumed from, so not the latest
            shutil.rmtree(target)
        partial.rename(target)
        files.mark(self.folder, files.LATEST, target)
        progress = about["progress"]
        if progress["best_iteration"] == progress["iteration"]:
            files.mark(self.folder, files.BEST, target)
        files.delete_old(self.folder, target, keep_last=self._keep_last)

    def _not_written(self, problem: str) -> str:
        if dist.get_rank() == 0:
            for partial in self.folder.glob("iter_*.partial"):  # gives the room back
                shutil.rmtree(partial, ignore_errors=True)
        previous = self.latest()
        kept = f"{previous.name} is complete" if previous else "there is no earlier one"
        return (
            f"{self._target} could not be written: {problem}. {kept}; make room or repair the "
            "disk, then start the same command again to go on from there"
        )


def _together(work: Callable[[], Any], done: str, path: Path, *, everywhere: bool = False) -> Any:
    """Work on rank 0 (or everywhere); an error on one rank becomes the same error on all."""
    result, problem = None, None
    if everywhere or dist.get_rank() == 0:
        try:
            result = work()
        except CheckpointError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{path} could not be {done}: {error}; the earlier checkpoints are untouched"
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise CheckpointError(found)
    return result


def _layout() -> dict[str, int | str]:
    """Where the generators of a checkpoint have the same meaning."""
    return {
        "device": device().type,
        "world_size": dist.get_world_size(),
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
    }


def _check_model(about: dict[str, Any], trainable: Trainable, path: Path) -> None:
    stored, now = about["model"], json.loads(json.dumps(asdict(trainable.geometry)))
    differing = [
        f"{name} {stored[name]} (checkpoint), {now[name]} (student.path)"
        for name in stored.keys() & now.keys()
        if stored[name] != now[name]
    ]
    if differing:
        raise CheckpointError(
            f"{path} holds another model: {'; '.join(sorted(differing))}; give the student it was "
            "trained from, or another checkpoint"
        )


def _progress_from(stored: dict[str, Any], path: Path) -> Progress:
    known = {f.name for f in fields(Progress)}
    if unknown := sorted(stored.keys() - known):
        raise CheckpointError(
            f"{path}: progress has fields this release does not know ({', '.join(unknown)}); use "
            "the release that wrote it"
        )
    return Progress(**stored)
