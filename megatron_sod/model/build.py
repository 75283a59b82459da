"""A Megatron GPTModel with the geometry of a Hugging Face model."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sod.config.schema import ParallelConfig
from megatron_sod.model.geometry import Geometry
from megatron_sod.model.layers import PackedCausalAttention, RMSNorm
from megatron_sod.parallel.cpu import device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class HiddenStateGPT(GPTModel):
    """A GPTModel whose last stage returns hidden states; `output_logits` applies the head.

    So the head runs on the rows that carry loss only, and prompt or tool tokens never get logits.
    """

    real_vocab_size: int  # columns past it are padding

    @property
    def vocab_start(self) -> int:
        """The id of this rank's first vocabulary row."""
        tp = self.pg_collection.tp
        return tp.rank() * (self.vocab_size // tp.size())

    def _postprocess(self, hidden_states, *args, **kwargs):
        return hidden_states

    def head_weight(self) -> torch.Tensor:
        """[V / TP, H] this rank's shard of the output head, tied or not."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

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


def unwrapped(module: torch.nn.Module) -> HiddenStateGPT:
    """The model itself, also when DDP wraps it."""
    return getattr(module, "module", module)  # type: ignore[arg-type]


def transformer_config(
    geometry: Geometry, parallel: ParallelConfig, *, dtype: torch.dtype
) -> TransformerConfig:
    """Megatron's configuration; every fused kernel that needs CUDA or Transformer-Engine is off
    where it is missing."""
    return TransformerConfig(
        num_layers=geometry.num_layers,
        hidden_size=geometry.hidden_size,
        ffn_hidden_size=geometry.ffn_hidden_size,
        num_attention_heads=geometry.num_attention_heads,
        num_query_groups=geometry.num_query_groups,
        kv_channels=geometry.head_dim,
        qk_layernorm=geometry.qk_norm,
        normalization="RMSNorm",
        layernorm_epsilon=geometry.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=geometry.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=geometry.initializer_range,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the one that allows variable lengths
        calculate_per_token_loss=True,
        use_cpu_initialization=not torch.cuda.is_available(),
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=True,
    )


def _block_spec(geometry: Geometry, config: TransformerConfig, pp_rank: int):
    """Transformer-Engine layers where it is installed, local layers otherwise."""
    if torch.cuda.is_available() and importlib.util.find_spec("transformer_engine"):
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=geometry.qk_norm)
    spec = get_gpt_layer_local_spec(qk_layernorm=geometry.qk_norm, normalization="RMSNorm")
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if geometry.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    attention.core_attention = PackedCausalAttention
    num_layers = get_num_layers_to_build(config, None, pp_rank)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=RMSNorm)


def build_model(
    geometry: Geometry,
    parallel: ParallelConfig,
    groups: ProcessGroupCollection,
    *,
    dtype: str = "float32",
) -> HiddenStateGPT:
    """This rank's part of the model, randomly initialised."""
    config = transformer_config(geometry, parallel, dtype=DTYPES[dtype])
    model = HiddenStateGPT(
        config=config,
        transformer_layer_spec=_block_spec(geometry, config, groups.pp.rank()),
        vocab_size=geometry.padded_vocab_size(parallel.tensor_model_parallel_size),
        max_sequence_length=geometry.max_position_embeddings,
        pre_process=groups.pp.rank() == 0,
        post_process=groups.pp.rank() == groups.pp.size() - 1,
        share_embeddings_and_output_weights=geometry.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=geometry.rope_theta,
        pg_collection=groups,
    )
    model.real_vocab_size = geometry.vocab_size
    return model.to(device())
