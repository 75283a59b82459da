"""A Megatron GPTModel with the geometry of a Hugging Face model."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import layers as linear_layers
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sod.config.schema import ParallelConfig
from megatron_sod.convert.layout import sharding_of
from megatron_sod.errors import ConfigError
from megatron_sod.model.geometry import Geometry
from megatron_sod.model.gpt import HiddenStateGPT, PipelineModel
from megatron_sod.model.layers import PackedCausalAttention, RMSNorm
from megatron_sod.model.rope import inverse_frequencies
from megatron_sod.parallel.cpu import device

Recompute = Literal["none", "selective", "full"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def has_transformer_engine(dtype: torch.dtype) -> bool:
    """Whether the layers come from Transformer-Engine, which needs a GPU. Its attention to packed
    sequences has kernels for 16 bits only; other dtypes get local layers, on GPUs too."""
    is_installed = bool(importlib.util.find_spec("transformer_engine"))
    return dtype == torch.bfloat16 and torch.cuda.is_available() and is_installed


def has_fused_gradient_accumulation(dtype: torch.dtype) -> bool:
    """Whether the matrix product itself can add weight gradients into `main_grad`:
    Transformer-Engine's linear layers by themselves, Megatron's own with apex's extension."""
    extension = importlib.util.find_spec("fused_weight_gradient_mlp_cuda")
    return has_transformer_engine(dtype) or (torch.cuda.is_available() and bool(extension))


def transformer_config(
    geometry: Geometry,
    parallel: ParallelConfig,
    *,
    dtype: torch.dtype,
    recompute: Recompute = "none",
) -> TransformerConfig:
    """Megatron's configuration; every fused kernel that needs CUDA or Transformer-Engine is off
    where it is missing."""
    options: dict[str, Any] = {}
    has_te = has_transformer_engine(dtype)
    if geometry.is_moe:
        options |= _moe_options(geometry) | dict(moe_grouped_gemm=has_te)
    if recompute == "full":
        options |= dict(recompute_method="uniform", recompute_num_layers=1)
    if recompute != "none":
        options["recompute_granularity"] = recompute
    if parallel.virtual_pipeline_model_parallel_size:
        # Batched exchanges mix up a rank's two neighbours where two stages make them one rank.
        options |= dict(overlap_p2p_comm=True, batch_p2p_comm=False)
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
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tp_size,
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
        apply_rope_fusion=has_te,
        gradient_accumulation_fusion=has_fused_gradient_accumulation(dtype),
        deallocate_pipeline_outputs=True,
        **options,
    )


def _moe_options(geometry: Geometry) -> dict[str, Any]:
    """Top-k routing as in transformers: a float32 softmax over all experts, no token dropped and no
    auxiliary loss, which would pull a distilled student away from its teacher."""
    return dict(
        num_moe_experts=geometry.num_experts,
        moe_ffn_hidden_size=geometry.expert_ffn_hidden_size,
        moe_router_topk=geometry.experts_per_token,
        # the softmax of the chosen logits equals the full softmax divided by the chosen sum
        moe_router_pre_softmax=not geometry.norm_topk_prob,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
    )


def _block_spec(geometry: Geometry, config: TransformerConfig, pp_rank: int, vp_stage: int | None):
    """Transformer-Engine layers where they can serve, local layers otherwise."""
    num_layers = get_num_layers_to_build(config, vp_stage, pp_rank)
    experts = geometry.num_experts or None
    if has_transformer_engine(config.params_dtype):
        spec = get_gpt_layer_with_transformer_engine_spec(
            experts, moe_grouped_gemm=geometry.is_moe, qk_layernorm=geometry.qk_norm
        )
        return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=TENorm)
    spec = get_gpt_layer_local_spec(
        experts, moe_grouped_gemm=False, qk_layernorm=geometry.qk_norm, normalization="RMSNorm"
    )
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if geometry.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    attention.core_attention = PackedCausalAttention
    if geometry.is_moe:
        # Checkpoints keep a norm under the linear it is fused into with Transformer-Engine. None
        # follows the norm before a router, which keeps its own name there, so here too.
        del layer.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=RMSNorm)


@contextlib.contextmanager
def _head_without_extension() -> Iterator[None]:
    """Megatron's linear layer refuses to be made for fused gradients without apex's extension, its
    output head beside Transformer-Engine's layers too. That head's own product is never used
    (HiddenStateGPT), so it may be made."""
    is_available = linear_layers._grad_accum_fusion_available
    linear_layers._grad_accum_fusion_available = True
    try:
        yield
    finally:
        linear_layers._grad_accum_fusion_available = is_available


def build_model(
    geometry: Geometry,
    parallel: ParallelConfig,
    groups: ProcessGroupCollection,
    *,
    dtype: str = "float32",
    recompute: Recompute = "none",
) -> PipelineModel:
    """This rank's part of the model, randomly initialised.

    Raises:
        ConfigError: float64 on a GPU.
    """
    if dtype == "float64" and torch.cuda.is_available():
        raise ConfigError(
            "dtype float64: on a GPU, Megatron clips float32 gradients alone and fused optimizers "
            "have no float64; take bfloat16 or float32 (float64 is for comparisons on CPU)"
        )
    config = transformer_config(geometry, parallel, dtype=DTYPES[dtype], recompute=recompute)
    num_chunks = parallel.virtual_pipeline_model_parallel_size or 1
    chunks = []
    for number in range(num_chunks):
        vp_stage = number if num_chunks > 1 else None
        with _head_without_extension():
            chunk = HiddenStateGPT(
                config=config,
                transformer_layer_spec=_block_spec(geometry, config, groups.pp.rank(), vp_stage),
                vocab_size=geometry.padded_vocab_size(parallel.tensor_model_parallel_size),
                max_sequence_length=geometry.max_position_embeddings,
                pre_process=groups.pp.rank() == 0 and number == 0,
                post_process=groups.pp.rank() == groups.pp.size() - 1 and number == num_chunks - 1,
                share_embeddings_and_output_weights=geometry.tied_embeddings,
                position_embedding_type="rope",
                rotary_base=geometry.rope_theta,
                pg_collection=groups,
                vp_stage=vp_stage,
            )
        chunk.rotary_pos_emb.inv_freq = inverse_frequencies(geometry)
        for name, parameter in chunk.named_parameters():
            if sharding_of(name) == "expert":
                # As Megatron marks them if they are spread: experts have an optimizer of their own
                # then, and checkpoints of all layouts the same names.
                parameter.allreduce = False  # type: ignore[attr-defined]
        chunks.append(chunk.to(device()))
    return PipelineModel(chunks, groups, real_vocab_size=geometry.vocab_size)
