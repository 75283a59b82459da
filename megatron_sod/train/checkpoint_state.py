"""What a checkpoint holds of one rank, as dist_checkpointing's sharded values."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_sod.train.trainable import Trainable

# The default sharding of the distributed optimizer cannot be saved by dist_checkpointing 0.16.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def sharded_state(trainable: Trainable, *, is_loading: bool) -> dict[str, Any]:
    """Model and optimizer, readable in any layout and by Transformer-Engine and local layers."""
    metadata = dict(_METADATA)  # Megatron adds its process group
    model_state = trainable.model.sharded_state_dict(metadata=metadata)
    if is_loading:
        _allocate_optimizer_state(trainable)
        # Objects are the modules' extra states, where Transformer-Engine keeps FP8 scales: other
        # layers have others, and nothing here is computed in FP8.
        _, model_state = extract_matching_values(
            model_state, lambda value: isinstance(value, ShardedObject)
        )
    optimizer_state = trainable.optimizer.sharded_state_dict(
        model_state, is_loading=is_loading, metadata=metadata
    )
    return {"model": model_state, "optimizer": optimizer_state}


def apply_state(trainable: Trainable, loaded: dict[str, Any]) -> None:
    """Put loaded values into model and optimizer, whichever kind of Adam saved them.

    Of the parameter groups only the step count is taken over. The settings stay those of the
    present configuration and kind: Megatron would replace the groups by the saved ones, which have
    no `bias_correction` for a fused Adam if torch's saved them.
    """
    trainable.model.load_sharded_state_dict(loaded["model"])
    saved = loaded["optimizer"]
    parts = _parts(trainable)
    saved_parts = [saved] if len(parts) == 1 else [saved[number] for number in range(len(parts))]
    for part, saved_part in zip(parts, saved_parts, strict=True):
        _place_step_count(part.optimizer, saved_part.get("optimizer", saved_part))
    groups = trainable.optimizer.param_groups
    kept = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in groups]
    trainable.optimizer.load_state_dict(saved)
    for group, settings in zip(trainable.optimizer.param_groups, kept, strict=True):
        group.update(settings)
    _separate_step_counts(trainable)


def _place_step_count(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """torch's Adam counts steps per parameter in float32; Transformer-Engine's and apex's per group
    as an integer, which their kernel takes. Megatron's checkpoints keep the former as one count
    under `state` or, of the distributed optimizer, in the groups."""
    groups, state = saved["param_groups"], saved.get("state", {})
    counts = [group["step"] for group in groups if group.get("step") is not None]
    if "common_step" in state:
        counts = [state["common_step"]]
    if not counts:  # saved before the first step
        return
    if isinstance(optimizer, torch.optim.Adam):
        if "state" in saved:
            state["common_step"] = torch.tensor(float(counts[0]))
        return
    state.pop("common_step", None)
    for group in groups:
        group["step"] = int(counts[0])


def sharded_random_state() -> ShardedObject:
    """The generators of this rank; meaningful in the same layout only."""
    world, rank = dist.get_world_size(), dist.get_rank()
    return ShardedObject("random_state", _random_state(), (world,), (rank,))


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "megatron": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def apply_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    tensor_parallel.get_cuda_rng_tracker().set_states(state["megatron"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _allocate_optimizer_state(trainable: Trainable) -> None:
    """torch's AdamW has no state before its first step, and Megatron reads the step count from it.

    The zero-gradient step this takes may touch the weights; loading overwrites both.
    """
    for part in _parts(trainable):
        initialise = getattr(part, "_init_optimizer_states_with_dummy_values", None)
        if initialise is None:
            continue
        if not part.optimizer.state:
            initialise()
        part._set_main_param_and_optimizer_states = partial(_set_states, part)


def _set_states(part: Any, model_param: Any, tensors: dict) -> None:
    """Megatron 0.16 copies every entry of the optimizer's state, torch's `step` too, which its
    checkpoints keep in the parameter groups instead; it has been restored from there."""
    group, order = part.model_param_group_index_map[model_param]
    state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
    if "step" in state:
        tensors = {**tensors, "step": state["step"]}
    type(part)._set_main_param_and_optimizer_states(part, model_param, tensors)


def _separate_step_counts(trainable: Trainable) -> None:
    """Megatron restores one `step` tensor for all parameters; AdamW would count it up once per
    parameter."""
    for part in _parts(trainable):
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def _parts(trainable: Trainable) -> list[Any]:
    return getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer])
