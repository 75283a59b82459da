"""Our end of vLLM's weight-transfer interface. Runs in vLLM's worker processes.

Each worker plans the transfer by itself and receives exactly its own shard: no worker, and no rank
of the trainer, ever holds more of the model than its part and a bucket.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from megatron_sod.errors import WeightTransferError
from megatron_sod.reshard.receive import ShardReceiver
from megatron_sod.reshard.setup import TransferSetup
from megatron_sod.reshard.vllm_model import LiveModel


@dataclass
class ReshardInit(WeightTransferInitInfo):
    """`refresh_tied_head` False reproduces vLLM's stale head, for a test."""

    setup: dict[str, Any]
    engine_index: int
    refresh_tied_head: bool = True


@dataclass
class ReshardUpdate(WeightTransferUpdateInfo):
    """The version being received."""

    policy_version: int
    transfer: int  # how many came before over this connection


class ReshardEngine(WeightTransferEngine[ReshardInit, ReshardUpdate]):
    """Receives this worker's shard by the plan and puts it into the live model."""

    init_info_cls = ReshardInit
    update_info_cls = ReshardUpdate
    _receiver: ShardReceiver | None = None

    def init_transfer_engine(self, init_info: ReshardInit) -> None:
        """Plan, compare the plan with the live model, open the transport.

        Raises:
            WeightTransferError: the model is quantised, or not the one the plan is for.
        """
        self.shutdown()
        setup = TransferSetup.from_dict(init_info.setup)
        self._check(setup)
        rank = get_tensor_model_parallel_rank()
        destination = init_info.engine_index * setup.engine.tp_size + rank
        tensors = {tensor.name: tensor for tensor in setup.plan().engine_tensors(rank)}
        self._live = LiveModel(self.model, self.model_config, tensors)
        self._receiver = ShardReceiver(setup, destination, self.device)
        self._refresh_tied_head = init_info.refresh_tied_head

    def _check(self, setup: TransferSetup) -> None:
        size = get_tensor_model_parallel_world_size()
        if size != setup.engine.tp_size:
            raise WeightTransferError(
                f"the engine runs tensor_parallel_size {size}, the transfer was planned for "
                f"{setup.engine.tp_size}"
            )
        if self.model_config.quantization is not None:
            raise WeightTransferError(
                f"the engine is quantised ({self.model_config.quantization}); only engines in the "
                "trainer's number format, or a plain wider or narrower one, can be filled"
            )

    def start_weight_update(self) -> None:
        assert self._receiver is not None, "connect before the first transfer"
        self._live.begin()

    def receive_weights(self, update_info: ReshardUpdate) -> None:
        assert self._receiver is not None
        self._receiver.receive(self._live, update_info.transfer)
        # Here and not in finish_weight_update: after a failure there vLLM would refuse to begin the
        # next update.
        self._live.finish(refresh_tied_head=self._refresh_tied_head)

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None
