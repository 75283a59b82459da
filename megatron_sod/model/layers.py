"""Local layers for machines without Transformer-Engine: RMSNorm and packed causal attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


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
    after each sequence, where causality keeps it from being read.
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
        """query [T, heads, d], key and value [T, groups, d] -> [T, heads * d]."""
        assert packed_seq_params is not None, "PackedCausalAttention serves packed sequences only"
        rows, columns, num_sequences = _grid(packed_seq_params.cu_seqlens_q, query.size(0))
        longest = int(packed_seq_params.max_seqlen_q)

        def spread(packed: torch.Tensor) -> torch.Tensor:
            grid = packed.new_zeros(num_sequences, longest, *packed.shape[1:])
            return grid.index_put((rows, columns), packed).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            spread(query),
            spread(key),
            spread(value),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return out.transpose(1, 2)[rows, columns].flatten(1)


def _grid(cu_seqlens: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(sequence, position) of each packed token."""
    lengths = cu_seqlens.diff().long()
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    positions = torch.arange(num_tokens, device=lengths.device)
    return rows, positions - cu_seqlens.long()[rows], len(lengths)
