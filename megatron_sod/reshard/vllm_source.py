"""The student for vLLM's own weight-transfer engines: whole tensors, one at a time, on rank 0.

The comparison for our own plan, and a way out where vLLM learns a transport we have not. Needs a
GPU: vLLM's nccl and ipc engines have no CPU form.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from megatron_sod.convert.layout import hf_shapes
from megatron_sod.errors import ConfigError
from megatron_sod.model.geometry import Geometry
from megatron_sod.model.gpt import PipelineModel
from megatron_sod.model.weights import gather_hf_tensors

_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


class MegatronSource(WeightSource):
    """Every HF tensor, gathered on rank 0 when its turn comes; other ranks only take part."""

    def __init__(self, model: PipelineModel, geometry: Geometry, vocab_size: int | None = None):
        """`vocab_size`: rows the engines hold; None: all of the student's."""
        self._model, self._geometry = model, geometry
        self._vocab_size = vocab_size or geometry.vocab_size

    def metadata(self) -> list[ParamMeta]:
        dtype = self._model.config.params_dtype
        shapes = hf_shapes(replace(self._geometry, vocab_size=self._vocab_size)).items()
        return [ParamMeta(name, dtype, tuple(shape)) for name, shape in shapes]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """A collective: every rank must iterate to the end; only rank 0 gets tensors."""
        for name, tensor in gather_hf_tensors(self._model, self._geometry):
            yield name, tensor[: self._vocab_size] if name in _VOCABULARY else tensor

    @property
    def num_bytes(self) -> int:
        return sum(torch.Size(m.shape).numel() * m.dtype.itemsize for m in self.metadata())


@dataclass
class _Client:
    """vLLM's four control calls on top of ours: one `update` pauses, receives and resumes."""

    connect: Callable[[dict], None]
    update: Callable[[dict, int], None]
    policy_version: int = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.connect(init_info)

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: Any) -> None:
        self.update(update_info, self.policy_version)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass


class VllmSender:
    """Drives vLLM's trainer-side engine; all trainer ranks construct it and call `send`."""

    def __init__(self, backend: str, source: MegatronSource, control, *, num_workers: int):
        """
        Args:
            backend: vllm_nccl or vllm_ipc.
            control: EngineControl on rank 0, None elsewhere.
            num_workers: engine workers, all engines together.
        Raises:
            ConfigError: there is no GPU, or several trainer ranks with vllm_ipc.
        """
        if not torch.cuda.is_available():
            raise ConfigError(
                f"transfer.backend {backend} needs a GPU: vLLM's own engines have no CPU form; use "
                "auto"
            )
        self.source, self.num_bytes = source, source.num_bytes
        self._client = _Client(*((control.connect, control.update) if control else (_no, _no)))
        self._engine = WeightTransferTrainerFactory.trainer_init(
            _init_info(backend, num_workers), client=self._client, source=source
        )

    def send(self, policy_version: int) -> None:
        """One transfer; vLLM's engine runs the control calls from rank 0."""
        self._client.policy_version = policy_version
        self._engine.send_weights()  # type: ignore[call-arg]

    def close(self) -> None:
        self._engine.shutdown()


def _no(*_: Any) -> None:
    raise AssertionError("only rank 0 talks to the engines")


def _init_info(backend: str, num_workers: int) -> Any:
    rank = dist.get_rank()
    if backend == "vllm_ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        if dist.get_world_size() > 1:
            raise ConfigError(
                "transfer.backend vllm_ipc needs whole tensors on every GPU and works with one "
                "trainer rank only; use auto"
            )
        return IPCTrainerInitInfo(rank=rank)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    holder = [_free_port() if rank == 0 else 0]
    dist.broadcast_object_list(holder, src=0)
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    return NCCLTrainerInitInfo(address, holder[0], 1 + num_workers, rank=rank)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
