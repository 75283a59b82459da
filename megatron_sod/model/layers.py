"""Layers where Transformer-Engine's cannot serve: RMSNorm and packed causal attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sod.parallel.context import held_tokens, whole_order


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension; statistics in float32 or wider.

    Unlike Megatron's WrappedTorchNorm it works with sequence parallelism: its weight is marked, so
    that finalize_model_grads sums the gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_unused):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(hidden.dtype)


class PackedCausalAttention(MegatronModule):
    """Causal attention over packed sequences (THD) through scaled_dot_product_attention.

    The pack is spread into a padded [sequences, heads, longest, head_dim] batch; padding sits
    after each sequence, where causality keeps it from being read. A context-parallel rank holds
    some of the queries and gathers all keys and values; their gradients are summed over the ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query [T, heads, d], key and value [T, groups, d] -> [T, heads * d]; T of this rank."""
        assert packed_seq_params is not None, "PackedCausalAttention serves packed sequences only"
        bounds, longest = packed_seq_params.cu_seqlens_q, int(packed_seq_params.max_seqlen_q)
        size = self.cp_group.size()
        grid = _Grid(bounds, longest)
        queries, mask = grid, None
        if size > 1:
            order = whole_order(bounds, size)
            key, value = (self._gathered(x)[order] for x in (key, value))
            held = held_tokens(bounds, self.cp_group.rank(), size)
            queries = _Grid(bounds // size, longest // size)
            positions = queries.spread(grid.columns[held])  # 0 where the grid is padding
            columns = torch.arange(longest, device=query.device)
            mask = (columns <= positions[:, :, None])[:, None]
        out = F.scaled_dot_product_attention(
            queries.spread(query).transpose(1, 2),
            grid.spread(key).transpose(1, 2),
            grid.spread(value).transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return queries.packed(out.transpose(1, 2)).flatten(1)

    def _gathered(self, local: torch.Tensor) -> torch.Tensor:
        """[T, ...] of all ranks, one rank after another; backward sums and scatters."""
        return gather_from_sequence_parallel_region(
            local, tensor_parallel_output_grad=True, group=self.cp_group
        )


class _Grid:
    """Between packed tokens [T, ...] and a padded grid [sequences, longest, ...]."""

    def __init__(self, cu_seqlens: torch.Tensor, longest: int):
        lengths = cu_seqlens.diff().long()
        self._num_sequences, self._longest = len(lengths), longest
        self._rows = torch.repeat_interleave(
            torch.arange(len(lengths), device=lengths.device), lengths
        )
        places = torch.arange(len(self._rows), device=lengths.device)
        self.columns = places - cu_seqlens.long()[self._rows]  # [T] position in its sequence

    def spread(self, packed: torch.Tensor) -> torch.Tensor:
        grid = packed.new_zeros(self._num_sequences, self._longest, *packed.shape[1:])
        return grid.index_put((self._rows, self.columns), packed)

    def packed(self, grid: torch.Tensor) -> torch.Tensor:
        return grid[self._rows, self.columns]
