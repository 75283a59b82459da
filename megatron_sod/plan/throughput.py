"""Tokens per second and peak memory of training iterations: random weights, recorded rollouts.

The real loop (`tools/train_sod.py` with `rollout.replay`): scoring by both models, credit, update,
records. No engine runs, so neither Ray nor vLLM is needed.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import yaml

from megatron_sod.data.synthetic import long_trajectories
from megatron_sod.data.tiny_models import VOCAB_SIZE, write_tiny_model
from megatron_sod.errors import DataError
from megatron_sod.observe.run_dir import read_rows
from megatron_sod.plan.geometries import MODELS
from megatron_sod.rollout.recording import Recording

WARM_UP = 1  # iterations left out: kernels are loaded, memory pools grow
PHASES = ("score", "train")


@dataclass(frozen=True)
class Work:
    """What one run trains on."""

    student: str  # a name in configs/models
    teacher: str
    num_ranks: int
    num_iterations: int
    num_prompts: int
    num_generations: int
    prompt_length: int  # tokens
    mean_response_length: int  # tokens, tool results included


def measure(root: Path, folder: Path, work: Work, overrides: Sequence[str]) -> list[str]:
    """Write models and rollouts into `folder`, train, and give one row of the table's cells.

    Raises:
        DataError: the run failed.
    """
    for role in ("student", "teacher"):
        write_model(folder / role, getattr(work, role))
    write_rollouts(folder / "rollouts", work)
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration(folder, work)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(work.num_ranks), "tools/train_sod.py"]
    command += ["--config", str(folder / "config.yaml"), *overrides]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    status = subprocess.run(command, cwd=root, env=environment).returncode
    if status:
        raise DataError(f"{work.student} with {work.teacher}: status {status}; see above")
    return cells(work, read_rows(folder / "run" / "metrics.jsonl"), overrides)


def write_model(directory: Path, name: str) -> None:
    """The configuration of configs/models/NAME.yaml and a small tokenizer; no weights."""
    geometry = yaml.safe_load((MODELS / f"{name}.yaml").read_text())
    write_tiny_model(directory, **geometry)


def write_rollouts(folder: Path, work: Work) -> None:
    """One recording per iteration."""
    for iteration in range(1, work.num_iterations + 1):
        Recording(folder).write(
            iteration,
            long_trajectories(
                work.num_prompts,
                work.num_generations,
                prompt_length=work.prompt_length,
                mean_response_length=work.mean_response_length,
                vocab_size=VOCAB_SIZE,
                seed=iteration,
            ),
        )


def configuration(folder: Path, work: Work) -> dict:
    """Of tools/train_sod.py: the paper's method with the exact loss, one optimizer step."""
    model = {"dtype": "bfloat16" if torch.cuda.is_available() else "float32"}
    return {
        "name": "throughput",
        "cluster": {"gpus_per_node": work.num_ranks},
        "student": {"path": str(folder / "student"), **model},
        "teacher": {"path": str(folder / "teacher"), **model},
        "distill": {"loss": "reverse_kl"},
        "data": {"train": [f"tiny_world:train:{work.num_prompts}"]},
        "rollout": {
            "num_generations": work.num_generations,
            "replay": str(folder / "rollouts"),
        },
        "train": {
            "num_iterations": work.num_iterations,
            "train_batch_size": work.num_prompts,
            "ppo_mini_batch_size": work.num_prompts,
            "save_interval": work.num_iterations + 1,
            "resume": "never",
            "export_hf": False,
        },
        "observe": {"run_dir": str(folder / "run"), "num_trajectories_kept": 0},
    }


def cells(work: Work, rows: list[dict], overrides: Sequence[str]) -> list[str]:
    """Medians over the iterations after the first; memory is the highest of all of them."""
    timed = rows[WARM_UP:]
    if not timed:
        raise DataError(f"{len(rows)} iteration(s); at least {WARM_UP + 1} are needed for a time")
    seconds = {p: statistics.median(row[f"time/{p}_s"] for row in timed) for p in PHASES}
    prompts = work.num_prompts * work.num_generations * work.prompt_length
    speeds = [
        (row["rollout/tokens"] + prompts) / sum(row[f"time/{p}_s"] for p in PHASES) for row in timed
    ]
    peaks = [row["memory/cuda_allocated_peak_gb"] for row in rows if _has_gpu(row)]
    peak = f"{max(peaks):.1f}" if peaks else "-"
    resident = max(row["memory/host_rss_gb"] for row in rows)
    tokens = statistics.median(row["rollout/tokens"] + prompts for row in timed)
    return [
        work.student,
        work.teacher,
        str(work.num_ranks),
        " ".join(overrides) or "-",
        f"{tokens:.0f}",
        f"{seconds['score']:.2f}",
        f"{seconds['train']:.2f}",
        f"{statistics.median(speeds):.0f}",
        peak,
        f"{resident:.1f}",
    ]


def _has_gpu(row: dict) -> bool:
    return "memory/cuda_allocated_peak_gb" in row


def page(rows: list[list[str]], command: str) -> str:
    """The table, with the machine it was measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, no GPU"
    return "\n".join(
        [
            "# Training iterations",
            "",
            f"Made by `{command}` on {date.today()}, {device}, torch {torch.__version__}. Random",
            "weights, recorded rollouts, the real loop; medians after the first iteration.",
            "",
            "| student | teacher | ranks | overrides | tokens | score, s | train, s | tokens/s "
            "| GPU peak, GB | host resident, GB |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *("| " + " | ".join(row) + " |" for row in rows),
            "",
        ]
    )
