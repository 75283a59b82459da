"""An engine worker's part of a transfer: verify, place, hand over parameter by parameter."""

from __future__ import annotations

from typing import Protocol

import torch

from megatron_sod.errors import WeightTransferError
from megatron_sod.reshard.layouts import EngineTensor
from megatron_sod.reshard.message import num_bytes, unpack
from megatron_sod.reshard.plan import Copy
from megatron_sod.reshard.setup import TransferSetup


class Destination(Protocol):
    """The engine's model, seen parameter by parameter."""

    def open(self, tensor: EngineTensor) -> torch.Tensor:
        """Where to put the numbers of `tensor`: the live parameter, or zeroed staging memory."""

    def close(self, tensor: EngineTensor, values: torch.Tensor) -> None:
        """`values` is complete and verified."""


class ShardReceiver:
    """Receives what the plan has for this worker. Nothing unverified is placed anywhere."""

    def __init__(self, setup: TransferSetup, destination: int, device: torch.device):
        self._dtype = setup.torch_dtype
        plan = setup.plan()
        self._messages = list(plan.messages_to(destination))
        rank = destination % setup.engine.tp_size
        self.tensors = {tensor.name: tensor for tensor in plan.engine_tensors(rank)}
        self._end = setup.receiving_end(destination, self._messages, device)

    def receive(self, model: Destination, transfer: int) -> None:
        """The whole of transfer number `transfer`, from 0, into `model`.

        Raises:
            WeightTransferError: naming what is corrupt or missing; the model may be half new then.
        """
        incoming = [(m.source, num_bytes(m, self._dtype)) for m in self._messages]
        opened: dict[str, torch.Tensor] = {}
        missing = {name: real_elements(tensor) for name, tensor in self.tensors.items()}
        try:
            self._end.expect(transfer, incoming)
            for message in self._messages:
                for copy, values, _ in unpack(message, self._end.take(), self._dtype):
                    self._place(copy, values, opened, missing, model)
                self._end.release()
            self._check_complete(missing)
        except BaseException:
            self._end.abort()
            raise

    def _place(self, copy: Copy, values: torch.Tensor, opened, missing, model: Destination) -> None:
        tensor = self.tensors[copy.tensor]
        if copy.tensor not in opened:
            opened[copy.tensor] = model.open(tensor)
        whole = opened[copy.tensor]
        part = whole if copy.expert is None else whole[copy.expert]
        part.narrow(copy.dim, copy.offset, copy.length).copy_(values)
        missing[copy.tensor] -= copy.num_elements
        if missing[copy.tensor] == 0:
            _check_padding(tensor, whole)
            model.close(tensor, opened.pop(copy.tensor))

    def _check_complete(self, missing: dict[str, int]) -> None:
        if wrong := {name: count for name, count in missing.items() if count}:
            name, count = next(iter(wrong.items()))
            raise WeightTransferError(
                f"{len(wrong)} engine parameters are incomplete, the first {name}: {count} of "
                f"{real_elements(self.tensors[name])} elements never came; the plan leaves them out"
            )

    def close(self) -> None:
        self._end.close()


def real_elements(tensor: EngineTensor) -> int:
    """Elements with a source; the others are padding."""
    total = 0
    for expert, segment in tensor.parts:
        shape = list(tensor.shape if expert is None else tensor.shape[1:])
        shape[segment.dim] = segment.length
        total += torch.Size(shape).numel()
    return total


def _check_padding(tensor: EngineTensor, values: torch.Tensor) -> None:
    """Rows without a source, the vocabulary's padding, must be zero."""
    if any(expert is not None for expert, _ in tensor.parts):
        return
    end = max(segment.local_start + segment.length for _, segment in tensor.parts)
    if tensor.parts[0][1].dim == 0 and bool(values[end:].any()):
        raise WeightTransferError(
            f"padding rows {end} to {values.shape[0]} of {tensor.name} are not zero: rows of the "
            "trainer's padding, or of another tensor, leaked into the engine"
        )
