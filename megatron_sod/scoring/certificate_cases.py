"""What the certificate goes through: every way of splitting a model that four ranks can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_sod.data.synthetic import write_model_with_weights
from megatron_sod.scoring.certificate import Case

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
TP4, PP4 = {"tensor_model_parallel_size": 4}, {"pipeline_model_parallel_size": 4}
CP2, CP4 = {"context_parallel_size": 2}, {"context_parallel_size": 4}
EP2, EP4 = {"expert_model_parallel_size": 2}, {"expert_model_parallel_size": 4}
SP = {"sequence_parallel": True}
CHUNKS = {**PP2, "virtual_pipeline_model_parallel_size": 2}
WHOLE_EXPERTS = {"expert_tensor_parallel_size": 1}
SMALL = 60  # tokens: several micro-batches, packed differently
TRUTH = {loss: Case(1, loss=loss) for loss in ("sampled_advantage", "jsd")}

DENSE = {
    "split": Case(1, tokens_per_micro_batch=SMALL),
    "recompute full": Case(1, recompute="full"),
    "tp2": Case(2, TP2),
    "tp2 sp": Case(2, {**TP2, **SP}),
    "pp2": Case(2, PP2),
    "pp2 two chunks": Case(2, CHUNKS),
    "cp2": Case(2, CP2),
    "dp2": Case(2),
    "tp2 split": Case(2, TP2, tokens_per_micro_batch=SMALL),
    "pp2 split": Case(2, PP2, tokens_per_micro_batch=SMALL),
    "pp2 two chunks split": Case(2, CHUNKS, tokens_per_micro_batch=SMALL),
    "cp2 split": Case(2, CP2, tokens_per_micro_batch=SMALL),
    "dp2 split": Case(2, tokens_per_micro_batch=SMALL),
    "tp2 sp recompute selective": Case(2, {**TP2, **SP}, recompute="selective"),
    "cp2 jsd": Case(2, CP2, loss="jsd"),
    "tp2, teacher pp2": Case(2, TP2, PP2),
    "dp2 split, teacher tp2": Case(2, {}, TP2, tokens_per_micro_batch=SMALL),
    "pp2 jsd, teacher cp2": Case(2, PP2, CP2, loss="jsd"),
    "tp4": Case(4, TP4),
    "tp4 sp": Case(4, {**TP4, **SP}),
    "pp4": Case(4, PP4),
    "cp4": Case(4, CP4),
    "dp4 split": Case(4, tokens_per_micro_batch=SMALL),
    "tp2 pp2": Case(4, {**TP2, **PP2}),
    "tp2 sp pp2": Case(4, {**TP2, **SP, **PP2}),
    "tp2 sp pp2 two chunks split": Case(4, {**TP2, **SP, **CHUNKS}, None, SMALL),
    "tp2 dp2 split": Case(4, TP2, None, SMALL),
    "tp2 sp dp2 split": Case(4, {**TP2, **SP}, None, SMALL),
    "pp2 dp2 split": Case(4, PP2, None, SMALL),
    "tp2 sp cp2": Case(4, {**TP2, **SP, **CP2}),
    "pp2 cp2 split": Case(4, {**PP2, **CP2}, None, SMALL),
    "cp2 dp2 split": Case(4, CP2, None, SMALL),
    "tp2 pp2 jsd split": Case(4, {**TP2, **PP2}, None, SMALL, "jsd"),
    "tp2 dp2 split, teacher pp2 cp2": Case(4, TP2, {**PP2, **CP2}, SMALL),
    "cp2 dp2 jsd, teacher tp4": Case(4, CP2, TP4, loss="jsd"),
}
EXPERTS = {
    "split": Case(1, tokens_per_micro_batch=SMALL),
    "ep2": Case(2, EP2),
    "ep2 split": Case(2, EP2, tokens_per_micro_batch=SMALL),
    "pp2 split": Case(2, PP2, tokens_per_micro_batch=SMALL),
    "cp2": Case(2, CP2),
    "tp2 sp": Case(2, {**TP2, **SP}),
    "ep2 recompute full": Case(2, EP2, recompute="full"),
    "tp2 sp ep2 whole experts": Case(2, {**TP2, **SP, **EP2, **WHOLE_EXPERTS}),
    "ep2, teacher pp2": Case(2, EP2, PP2),
    "ep4": Case(4, EP4),
    "ep2 pp2 split": Case(4, {**EP2, **PP2}, None, SMALL),
    "ep2 pp2 two chunks": Case(4, {**EP2, **CHUNKS}),
    "ep2 cp2": Case(4, {**EP2, **CP2}),
    "tp2 sp ep2 split": Case(4, {**TP2, **SP, **EP2}, None, SMALL),
    "tp2 sp pp2": Case(4, {**TP2, **SP, **PP2}),
}
SHARED_KV = {  # with four ranks, two share a KV head
    "split": Case(1, tokens_per_micro_batch=SMALL),
    "tp4": Case(4, TP4),
    "tp4 sp split": Case(4, {**TP4, **SP}, None, SMALL),
    "tp4 jsd, teacher tp2 cp2": Case(4, TP4, {**TP2, **CP2}, loss="jsd"),
    "tp2 dp2 split, teacher tp4": Case(4, TP2, TP4, SMALL),
}
# A router's softmax is float32 whatever the model's precision, so experts cannot reach 1e-10.
FAMILIES = {"dense": (DENSE, 1e-10), "two KV heads": (SHARED_KV, 1e-10), "experts": (EXPERTS, 1e-6)}

_HEADS = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "tie_word_embeddings": False,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "experts": _MOE,
    "two KV heads": {"num_key_value_heads": 2},
}


def write_models(folder: Path, family: str) -> tuple[str, str]:
    """Directories of a random student and a wider random teacher, in float64."""
    shape: dict[str, Any] = {**_HEADS, **_OF_FAMILY.get(family, {})}
    options: dict[str, Any] = dict(dtype=torch.float64, **shape)
    student = write_model_with_weights(folder / "student", seed=1, **options)
    teacher = write_model_with_weights(folder / "teacher", seed=2, hidden_size=128, **options)
    return str(student), str(teacher)
