"""The trainer's side of a weight transfer: publish, let the engines read, prove it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sod.convert.layout import hf_shapes
from megatron_sod.errors import WeightTransferError
from megatron_sod.model.geometry import Geometry
from megatron_sod.model.gpt import PipelineModel
from megatron_sod.model.weights import owned_segments
from megatron_sod.reshard.manifest import SharedPieces, as_dicts


@dataclass(frozen=True)
class TransferReport:
    """One transfer."""

    policy_version: int
    wall_s: float
    num_bytes: int
    canary_max_error: float  # nats, over all canary tokens and engines


@dataclass(frozen=True)
class EngineControl:
    """What rank 0 can ask of all engines; None on other ranks."""

    connect: Callable[[dict], None]
    update: Callable[[dict, int], None]
    score: Callable[[list[list[int]]], list[list[list[float]]]]  # [engine][canary][token]


class WeightSync:
    """Plans once, transfers many times. All trainer ranks construct it and call `transfer`."""

    def __init__(
        self,
        model: PipelineModel,
        geometry: Geometry,
        control: EngineControl | None,
        *,
        canaries: list[list[int]],
        trainer_logprobs: Callable[[list[list[int]]], list[list[float]]],
        tolerance: float,
        refresh_tied_head: bool = True,
    ):
        """
        Args:
            control: on rank 0, None elsewhere.
            canaries: token sequences scored by engine and trainer after every transfer.
            trainer_logprobs: collective; logprobs of each canary's tokens but the first.
            tolerance: nats.
        """
        self._model, self._geometry, self._control = model, geometry, control
        self._canaries, self._trainer_logprobs = canaries, trainer_logprobs
        self._tolerance = tolerance
        self._folder = _shared_folder()
        segments = [(s, view) for s, view in owned_segments(model, geometry)]
        self._pieces = SharedPieces(
            self._folder,
            dist.get_rank(),
            [(s.hf_name, s.dim, s.hf_start, tuple(view.shape)) for s, view in segments],
            model.config.params_dtype,
        )
        offers: list[list[dict]] = [[]] * dist.get_world_size()
        dist.all_gather_object(offers, as_dicts(self._pieces.pieces))
        self._num_bytes = sum(p.num_bytes for p in self._pieces.pieces)
        if control is not None:
            control.connect(
                {
                    "pieces": [piece for offer in offers for piece in offer],
                    "shapes": {name: list(s) for name, s in hf_shapes(geometry).items()},
                    "refresh_tied_head": refresh_tied_head,
                }
            )

    def transfer(self, policy_version: int) -> TransferReport:
        """Bring every engine to the trainer's current weights and check it. A collective.

        Raises:
            WeightTransferError: canary logprobs differ by more than the tolerance; on all ranks.
        """
        started = time.monotonic()
        views = (view for _, view in owned_segments(self._model, self._geometry))
        self._pieces.publish(views)
        dist.barrier()
        if self._control is not None:
            self._control.update({"policy_version": policy_version}, policy_version)
        wall_s = time.monotonic() - started
        error = self._canary_error()
        if not error <= self._tolerance:
            raise WeightTransferError(
                f"policy version {policy_version}: engine and trainer logprobs differ by "
                f"{error:.3g} nats on canary prompts, tolerance {self._tolerance:.3g}; the engines "
                "do not hold the trainer's weights (a stale or permuted tensor), or dtypes differ: "
                "raise transfer.canary_tolerance only if engine.dtype is lower than student.dtype"
            )
        return TransferReport(policy_version, wall_s, self._num_bytes, error)

    def _canary_error(self) -> float:
        trainer = self._trainer_logprobs(self._canaries)
        error = torch.zeros(1, dtype=torch.float64)
        if self._control is not None:
            expected = torch.tensor([x for row in trainer for x in row])
            for engine in self._control.score(self._canaries):
                found = torch.tensor([x for row in engine for x in row])
                error = torch.maximum(error, (found - expected).abs().max().double())
        holder = [float(error)]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def close(self) -> None:
        self._pieces.close()
        if dist.get_rank() == 0:
            shutil.rmtree(self._folder, ignore_errors=True)


def _shared_folder() -> str:
    """A fresh folder in shared memory, made by rank 0 and known to all."""
    holder = [""]
    if dist.get_rank() == 0:
        base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        _remove_abandoned(Path(base or tempfile.gettempdir()))
        holder[0] = tempfile.mkdtemp(prefix=f"megatron_sod-{os.getpid()}-", dir=base)
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def _remove_abandoned(base: Path) -> None:
    """Folders of runs that were killed: their owner's process id is gone."""
    for folder in base.glob("megatron_sod-*-*"):
        owner = folder.name.split("-")[1]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(folder, ignore_errors=True)
