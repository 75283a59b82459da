"""What a checkpoint holds, layout apart."""

from __future__ import annotations

import torch

VOCAB = 381  # padded to 512 with TP 2 and 4, to 384 with TP 1


def saved_tensors(checkpoints, trainable, iteration: int = 1) -> dict[str, torch.Tensor]:
    """Save the present state; every tensor of the checkpoint whole, without padded vocabulary rows.
    A collective."""
    from megatron.core import dist_checkpointing

    from megatron_sod.train.checkpoint import Progress

    checkpoints.save(trainable, Progress(iteration, 0, 0, 0, ""))
    checkpoints.finish()
    tensors = dict(_flat(dist_checkpointing.load_plain_tensors(str(checkpoints.latest()))))
    return {
        name: tensor[:VOCAB].clone() if "embedding" in name or "output_layer" in name else tensor
        for name, tensor in tensors.items()
    }


def _flat(values: dict, prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, torch.Tensor):
            yield prefix + str(key), value
        elif isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
