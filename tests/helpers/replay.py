"""Runs of the real command line on recorded rollouts: two ranks, no engine, seconds per start."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_sod.rollout.recording import Recording
from tests.helpers.tiny import synthetic_trajectories, write_model_with_weights

VOCAB = 384
TIMED = ("time/", "timing_", "perf/t", "memory/", "gpu/")  # what a clock or the machine decides


def write_inputs(folder: Path, num_iterations: int) -> None:
    """Student, teacher and the recorded rollouts of every iteration."""
    write_model_with_weights(folder / "student", seed=1)
    write_model_with_weights(folder / "teacher", seed=2, num_hidden_layers=3)
    recording = Recording(folder / "recorded" / "rollouts")
    for iteration in range(1, num_iterations + 1):
        recording.write(iteration, synthetic_trajectories(4, 2, vocab_size=VOCAB, seed=iteration))


def arguments(folder: Path, run_dir: Path, num_iterations: int, *more: str) -> list[str]:
    """Of tools/train_sod.py, for two ranks."""
    return [
        "--config",
        "configs/demo_cpu.yaml",
        "name=replay",
        f"observe.run_dir={run_dir}",
        f"student.path={folder / 'student'}",
        f"teacher.path={folder / 'teacher'}",
        f"rollout.replay={folder / 'recorded' / 'rollouts'}",
        "rollout.num_generations=2",
        "data.train=[tiny_world:train:64]",
        "data.eval=[]",
        "eval.teacher=false",
        f"train.num_iterations={num_iterations}",
        "train.train_batch_size=4",
        "train.ppo_mini_batch_size=2",
        "train.save_interval=1",
        "train.lr=1e-3",
        "train.export_hf=true",
        "watchdog.max_infra_error_rate=1.0",
        *more,
    ]


def outcome(run_dir: Path) -> tuple[list[dict], bytes]:
    """Every iteration's scalars that do not measure time or machine, and the final weights."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    kept = [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in rows]
    return kept, (run_dir / "hf" / "model.safetensors").read_bytes()
