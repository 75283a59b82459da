"""What both sides agree on before the first transfer. Plain data, carried in a control message."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from megatron_sod.model.geometry import Geometry
from megatron_sod.reshard.layouts import EngineLayout, TrainerLayout
from megatron_sod.reshard.message import num_bytes
from megatron_sod.reshard.p2p import PointToPointReceiver, PointToPointSender, join
from megatron_sod.reshard.plan import Message, ReshardPlan
from megatron_sod.reshard.shared_slots import SlotReceiver, SlotSender
from megatron_sod.reshard.transport import Receiving, Sending


@dataclass(frozen=True)
class TransferSetup:
    """Enough for any rank of either side to plan the transfer and open its end of it."""

    geometry: Geometry
    trainer: TrainerLayout
    engine: EngineLayout
    dtype: str  # of what travels, the trainer's parameters: "bfloat16"
    bucket_bytes: int
    backend: str  # shared_memory | ipc | p2p
    timeout_s: float
    # p2p: NCCL refuses two processes of one GPU, so colocated engines are reached through the host
    through_host: bool = False
    is_kept: bool = False  # shared_memory: engines that start later can read what was sent
    folder: str = ""  # shared_memory, ipc: where the links lie
    address: str = ""  # p2p: the store's host and port, and this connection's name
    port: int = 0
    name: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(replace(self, geometry=replace(self.geometry, rope_scaling=None)))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> TransferSetup:
        parts = {
            "geometry": Geometry(**fields["geometry"]),
            "trainer": TrainerLayout(**fields["trainer"]),
            "engine": EngineLayout(**fields["engine"]),
        }
        return cls(**{**fields, **parts})

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def plan(self) -> ReshardPlan:
        return ReshardPlan(
            self.geometry,
            self.trainer,
            self.engine,
            bucket_elements=self.bucket_bytes // self.torch_dtype.itemsize,
        )

    def sending_end(self, rank: int, messages: list[Message], device: torch.device) -> Sending:
        """Open trainer rank `rank`'s end. p2p: returns when every member has joined."""
        sizes = _sizes(messages, self.torch_dtype, lambda message: message.destination)
        if self.backend == "p2p":
            device = self._wire_device(device)
            group = self._join(rank, device)
            return PointToPointSender(group, self.trainer.world_size, _largest(sizes), device)
        return SlotSender(self.folder, rank, sizes, device=device, **self._slots)

    def receiving_end(
        self, destination: int, messages: list[Message], device: torch.device
    ) -> Receiving:
        """Open engine worker `destination`'s end."""
        sizes = _sizes(messages, self.torch_dtype, lambda message: message.source)
        if self.backend == "p2p":
            device = self._wire_device(device)
            group = self._join(self.trainer.world_size + destination, device)
            return PointToPointReceiver(group, _largest(sizes), device)
        return SlotReceiver(self.folder, destination, sizes, device=device, **self._slots)

    def _wire_device(self, device: torch.device) -> torch.device:
        return torch.device("cpu") if self.through_host else device

    @property
    def _slots(self) -> dict[str, Any]:
        return {"is_kept": self.is_kept, "timeout_s": self.timeout_s}

    def _join(self, rank: int, device: torch.device):
        return join(
            self.address,
            self.port,
            name=self.name,
            rank=rank,
            size=self.trainer.world_size + self.engine.num_destinations,
            device=device,
            timeout_s=self.timeout_s,
        )


def _sizes(messages: list[Message], dtype: torch.dtype, peer_of) -> dict[int, list[int]]:
    sizes: dict[int, list[int]] = {}
    for message in messages:
        sizes.setdefault(peer_of(message), []).append(num_bytes(message, dtype))
    return sizes


def _largest(sizes: dict[int, list[int]]) -> int:
    return max((max(of_peer) for of_peer in sizes.values()), default=1)
