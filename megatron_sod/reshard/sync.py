"""The trainer's side of weight transfers: connect once, then pause, send, prove, resume."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_sod.config.schema import TransferConfig
from megatron_sod.errors import WeightTransferError
from megatron_sod.model.geometry import Geometry
from megatron_sod.model.gpt import PipelineModel
from megatron_sod.reshard.checksum import as_unsigned
from megatron_sod.reshard.layouts import EngineLayout
from megatron_sod.reshard.meeting import Meeting
from megatron_sod.reshard.send import ShardSender, index_shards
from megatron_sod.reshard.setup import TransferSetup
from megatron_sod.reshard.shards import local_shards, trainer_layout


@dataclass(frozen=True)
class TransferReport:
    """One transfer that was proven."""

    policy_version: int
    wall_s: float  # from the pause of the engines to their resumption
    num_bytes: int  # sent by all trainer ranks together
    canary_max_error: float | None  # nats, over canary tokens and engines; None: not due
    checksums: dict[str, str]  # HF tensor -> 64 bits in hexadecimal, on rank 0 when due


@dataclass(frozen=True)
class EngineControl:
    """What rank 0 can ask of all engines; None on other ranks."""

    layout: EngineLayout
    hosts: Callable[[], list[str]]
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
        config: TransferConfig,
        canaries: list[list[int]],
        trainer_logprobs: Callable[[list[list[int]]], list[list[float]]],
        is_colocated: bool = True,
        refresh_tied_head: bool = True,
    ):
        """
        Args:
            control: on rank 0, None elsewhere.
            canaries: token sequences scored by engine and trainer to prove a transfer.
            trainer_logprobs: collective; logprobs of each canary's tokens but the first.
            is_colocated: engines may live on the trainers' GPUs.
            refresh_tied_head: False reproduces vLLM's stale head, for a test.
        Raises:
            WeightTransferError: an engine cannot be reached, or holds another model.
        """
        self._control, self._config = control, config
        self._canaries, self._trainer_logprobs = canaries, trainer_logprobs
        self._is_colocated = is_colocated
        self._tolerance = config.tolerance(str(model.config.params_dtype).removeprefix("torch."))
        self._num_transfers = 0
        self._vllm = None
        if config.backend.startswith("vllm_"):
            self._vllm = self._vllm_sender(model, geometry)
            self._num_bytes = self._vllm.num_bytes
            return
        device = next(model.parameters()).device
        self._meeting = Meeting(config.backend, control.hosts() if control else [], device)
        setup = self._agree(model, geometry)
        self._connect(setup, model, geometry, device, refresh_tied_head)

    def _vllm_sender(self, model: PipelineModel, geometry: Geometry):
        from megatron_sod.reshard.vllm_source import MegatronSource, VllmSender

        layout = self._engine_layout()
        source = MegatronSource(model, geometry, layout.vocab_size)
        return VllmSender(
            self._config.backend, source, self._control, num_workers=layout.num_destinations
        )

    def _engine_layout(self) -> EngineLayout:
        """On every rank; rank 0 knows the engines."""
        holder: list = [self._control.layout if self._control else None]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def _agree(self, model: PipelineModel, geometry: Geometry) -> TransferSetup:
        """The same setup on every rank."""
        return TransferSetup(
            geometry=geometry,
            trainer=trainer_layout(model),
            engine=self._engine_layout(),
            dtype=str(model.config.params_dtype).removeprefix("torch."),
            bucket_bytes=self._config.bucket_mb << 20,
            timeout_s=self._config.timeout_s,
            through_host=self._is_colocated,
            is_kept=self._config.keep_sent and self._meeting.place["backend"] == "shared_memory",
            **self._meeting.place,
        )

    def _connect(self, setup, model, geometry, device, refresh_tied_head: bool) -> None:
        shards = index_shards(local_shards(model, geometry))
        info = {"setup": setup.as_dict(), "refresh_tied_head": refresh_tied_head}
        what, at_once = "connecting trainer and engines", setup.backend == "p2p"
        engines = _EnginesCall()
        if self._control is not None and at_once:  # all members of a group join together
            engines.start(self._control.connect, info)
        with _all_or_none(what):
            self._sender = ShardSender(setup, dist.get_rank(), shards, device)
        with _all_or_none(what):
            if self._control is not None and not at_once:  # the links exist before they are opened
                engines.start(self._control.connect, info)
            engines.join()
        total = torch.tensor([self._sender.num_bytes], dtype=torch.int64, device=device)
        dist.all_reduce(total)
        self._num_bytes = int(total)

    def transfer(self, policy_version: int) -> TransferReport:
        """Bring every engine to the trainer's current weights and prove it. A collective.

        Raises:
            WeightTransferError: on all ranks. A checksum differs, an engine or a rank is gone, or
                canary logprobs differ by more than the tolerance. No engine serves after it.
        """
        started = time.monotonic()
        with _all_or_none(f"policy version {policy_version}"):
            if self._vllm is not None:
                self._vllm.send(policy_version)
            else:
                self._send(policy_version)
        wall_s = time.monotonic() - started
        due = self._num_transfers % self._config.canary_interval == 0
        self._num_transfers += 1
        if not due:
            return TransferReport(policy_version, wall_s, self._num_bytes, None, {})
        error = self._check_canaries(policy_version)
        return TransferReport(policy_version, wall_s, self._num_bytes, error, self._checksums())

    def _send(self, policy_version: int) -> None:
        """This rank's messages, while a thread of rank 0 waits for the engines."""
        engines = _EnginesCall(on_failure=self._sender.cancel)
        if self._control is not None:
            info = {"policy_version": policy_version, "transfer": self._num_transfers}
            engines.start(self._control.update, info, policy_version)
        try:
            self._sender.send()
        finally:
            engines.join()  # if one of them failed, its message is the one that matters

    def _checksums(self) -> dict[str, str]:
        """What the engines received and found equal, tensor by tensor; empty but on rank 0."""
        if self._vllm is not None:
            return {}  # vLLM's own engines know no checksums: the canaries are the proof
        parts: list[dict[str, int]] = [{}] * dist.get_world_size()
        is_main = dist.get_rank() == 0
        dist.gather_object(self._sender.checksums(), parts if is_main else None)
        total: dict[str, int] = {}
        for part in parts if is_main else []:
            for name, value in part.items():
                total[name] = as_unsigned(total.get(name, 0) + value)
        return {name: f"{value:016x}" for name, value in sorted(total.items())}

    def _check_canaries(self, policy_version: int) -> float:
        error, tolerance = self._canary_error(), self._tolerance
        if not error <= tolerance:
            raise WeightTransferError(
                f"policy version {policy_version}: engine and trainer logprobs differ by "
                f"{error:.3g} nats on canary prompts, tolerance {tolerance:.3g}, although every "
                "checksum agreed: the engines do not hold the trainer's weights where they "
                "compute from (a layout this package has wrong), or dtypes differ: raise "
                "transfer.canary_tolerance only if engine.dtype is lower than student.dtype"
            )
        return error

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
        if self._vllm is not None:
            self._vllm.close()
            return
        self._sender.close()
        self._meeting.close()


class _EnginesCall:
    """A call to the engines under way in a thread, while this rank does its own part."""

    def __init__(self, on_failure: Callable[[], None] = lambda: None):
        self._on_failure = on_failure
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self, call: Callable[..., None], *arguments) -> None:
        def watch() -> None:
            try:
                call(*arguments)
            except Exception as error:
                self._error = error
                self._on_failure()

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the call, if there is one; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error


class _all_or_none:
    """A part of the work that fails on all ranks when it fails on one. A collective on leaving."""

    def __init__(self, what: str):
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # the process is being ended
        mine = None if error is None else f"rank {dist.get_rank()}: {error}"
        failures: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, mine)
        if found := [failure for failure in failures if failure]:
            raise WeightTransferError(
                f"weight transfer failed ({self._what}); " + "; ".join(found)
            ) from error
