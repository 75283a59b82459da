"""Tiny models with weights and synthetic trajectories, made on the spot."""

from __future__ import annotations

from pathlib import Path

from megatron_sod.config.schema import SodConfig
from megatron_sod.data.synthetic import synthetic_trajectories, write_model_with_weights

__all__ = ["sod_config", "synthetic_trajectories", "write_model_with_weights"]


def sod_config(student_path: Path | str, teacher_path: Path | str, **sections) -> SodConfig:
    """A small valid configuration; keyword sections replace defaults."""
    values = {
        "student": {"path": str(student_path)},
        "teacher": {"path": str(teacher_path)},
        "data": {"train": ["tiny_world:train:8"]},
        "train": {"num_iterations": 1, "train_batch_size": 4, "ppo_mini_batch_size": 2},
        **sections,
    }
    return SodConfig.model_validate(values)
