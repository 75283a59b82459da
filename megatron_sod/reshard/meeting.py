"""Where trainer ranks and engine workers meet: a shared folder, or a store with an address."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sod.errors import ConfigError


class Meeting:
    """Chooses the backend and owns what it needs. Constructed on all ranks; a collective."""

    def __init__(self, backend: str, engine_hosts: list[str], device: torch.device):
        """
        Args:
            backend: auto, shared_memory, ipc or p2p.
            engine_hosts: on rank 0, one name per engine.
        Raises:
            ConfigError: `backend` cannot connect these hosts or devices.
        """
        hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(hosts, socket.gethostname())
        holder: list = [None]
        self._folder = ""
        self._store: dist.TCPStore | None = None
        if dist.get_rank() == 0:
            chosen = choose_backend(backend, {*hosts, *engine_hosts}, device.type)
            holder[0] = self._open(chosen)
        dist.broadcast_object_list(holder, src=0)
        self.place: dict[str, Any] = holder[0]

    def _open(self, backend: str) -> dict[str, Any]:
        if backend == "p2p":
            address = os.environ.get("MASTER_ADDR", "127.0.0.1")
            self._store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
            return {"backend": backend, "address": address, "port": self._store.port, "name": "p2p"}
        self._folder = _shared_folder()
        return {"backend": backend, "folder": self._folder}

    def close(self) -> None:
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._store = None


def choose_backend(backend: str, hosts: set[str], device: str) -> str:
    """The transport for trainer and engines on `hosts`, with weights on `device`.

    Raises:
        ConfigError: the wanted backend does not fit.
    """
    best = "p2p" if len(hosts) > 1 else "ipc" if device == "cuda" else "shared_memory"
    if backend in ("auto", best, "p2p"):
        return "p2p" if backend == "p2p" else best
    raise ConfigError(
        f"transfer.backend {backend} does not fit: trainer and engines are on "
        f"{len(hosts)} host(s) with weights on {device}; use auto (here: {best}) or p2p"
    )


def _shared_folder() -> str:
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    _remove_abandoned(Path(base or tempfile.gettempdir()))
    return tempfile.mkdtemp(prefix=f"megatron_sod-{os.getpid()}-", dir=base)


def _remove_abandoned(base: Path) -> None:
    """Folders of runs that were killed: their owner's process id is gone."""
    for folder in base.glob("megatron_sod-*-*"):
        owner = folder.name.split("-")[1]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(folder, ignore_errors=True)
