"""Our end of vLLM's weight-transfer interface: reads the trainer ranks' pieces, reloads layerwise.

Runs in vLLM's worker processes. Each worker reads every piece it needs straight from the rank that
owns it; no rank ever holds the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from megatron_sod.reshard.manifest import PieceReader


@dataclass
class SharedPiecesInit(WeightTransferInitInfo):
    """Where the pieces lie. `refresh_tied_head` False reproduces vLLM's stale head, for a test."""

    pieces: list[dict]
    shapes: dict[str, list[int]]
    refresh_tied_head: bool = True


@dataclass
class SharedPiecesUpdate(WeightTransferUpdateInfo):
    """The version being received."""

    policy_version: int


class SharedPiecesEngine(WeightTransferEngine[SharedPiecesInit, SharedPiecesUpdate]):
    """Reads pieces from shared memory and loads them in checkpoint format."""

    init_info_cls = SharedPiecesInit
    update_info_cls = SharedPiecesUpdate

    def init_transfer_engine(self, init_info: SharedPiecesInit) -> None:
        self._reader = PieceReader(init_info.pieces, init_info.shapes)
        self._refresh_tied_head = init_info.refresh_tied_head

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SharedPiecesUpdate) -> None:
        self.model.load_weights(self._reader.tensors())  # type: ignore[operator]

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self._refresh_tied_head:
            self._reprocess_tied_head()

    def _reprocess_tied_head(self) -> None:
        """With tied embeddings nothing is loaded into lm_head itself, so the reload leaves the
        form it had been prepacked into on CPU: the old weights, with only a warning."""
        head = getattr(self.model, "lm_head", None)
        method = getattr(head, "quant_method", None)
        tied = getattr(self.model.config, "tie_word_embeddings", False)
        if tied and method is not None:
            method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        del self._reader
