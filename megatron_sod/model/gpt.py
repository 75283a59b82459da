"""The part of a GPT model that one rank holds, and its output head applied to chosen rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig


class HiddenStateGPT(GPTModel):
    """A chunk of a GPT model; the last one returns hidden states, not logits.

    So the head runs on the rows that carry loss only, and prompt or tool tokens never get logits.
    """

    def _postprocess(self, hidden_states, *args, **kwargs):
        return hidden_states


class PipelineModel(torch.nn.Module):
    """This rank's part of a model: one chunk of layers, or several in an interleaved pipeline.

    `runnable` is what the schedules run: the chunks, or the DDP modules around them once the model
    is trained.
    """

    def __init__(
        self,
        chunks: list[HiddenStateGPT],
        groups: ProcessGroupCollection,
        *,
        real_vocab_size: int,
    ):
        """`real_vocab_size`: vocabulary columns past it are padding. A run whose teacher has fewer
        lowers it."""
        super().__init__()
        self.chunks = torch.nn.ModuleList(chunks)
        self.runnable: list[torch.nn.Module] = list(chunks)
        self.pg_collection, self.real_vocab_size = groups, real_vocab_size

    @property
    def config(self) -> TransformerConfig:
        return self._last.config

    @property
    def _last(self) -> HiddenStateGPT:
        return self.chunks[-1]  # type: ignore[return-value]

    @property
    def vocab_start(self) -> int:
        """The id of this rank's first vocabulary row."""
        tp = self.pg_collection.tp
        return tp.rank() * (self._last.vocab_size // tp.size())

    def global_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(name with the layer's number in the whole model, parameter) of this rank."""
        for chunk in self.chunks:
            for name, parameter in chunk.named_parameters():
                if name.startswith("decoder.layers."):
                    local, rest = name.removeprefix("decoder.layers.").split(".", 1)
                    number = chunk.decoder.layers[int(local)].layer_number - 1  # type: ignore
                    name = f"decoder.layers.{number}.{rest}"
                yield name, parameter

    def head_weight(self) -> torch.Tensor:
        """[V / TP, H] this rank's shard of the output head, tied or not; last stage only."""
        if self._last.share_embeddings_and_output_weights:
            return self._last.shared_embedding_or_output_weight()
        return self._last.output_layer.weight

    def select_rows(self, hidden_states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Rows [R, H] of the last stage's [S, 1, H], ready for a head shard on every TP rank.

        The backward pass sums the ranks' partial gradients once, here: an all-reduce, or a
        reduce-scatter under sequence parallelism.
        """
        tp_group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=tp_group
            )
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=tp_group)
        return hidden_states.squeeze(1)[rows]

    def output_logits(self, hidden_states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[R, V / TP] logits of the given rows."""
        return F.linear(self.select_rows(hidden_states, rows), self.head_weight())

    def sharded_state_dict(self, **options) -> dict:
        """For dist_checkpointing; the keys of a model in one chunk are Megatron's own."""
        if len(self.chunks) == 1:
            return self._last.sharded_state_dict(**options)
        return {
            f"chunk{number}": chunk.sharded_state_dict(**options)  # type: ignore[operator]
            for number, chunk in enumerate(self.chunks)
        }

    def load_sharded_state_dict(self, state: dict) -> None:
        """Fill the chunks from what `sharded_state_dict` described and was loaded."""
        for number, chunk in enumerate(self.chunks):
            chunk.load_state_dict(state.get(f"chunk{number}", state), strict=False)
