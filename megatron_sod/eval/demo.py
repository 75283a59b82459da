"""The demo, run again under other methods, seeds and settings.

A run is `configs/demo_cpu.yaml` with overrides, started as a person would start it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Runs = dict[str, tuple[str, list[str]]]  # name: (what the table calls it, overrides)

SEEDS_AND_CONTROLS: Runs = {
    "sod-0": ("SOD, seed 0", ["seed=0"]),
    "sod-1": ("SOD, seed 1", ["seed=1"]),
    "sod-2": ("SOD, seed 2", ["seed=2"]),
    "lr0": ("learning rate 0", ["train.lr=0.0"]),
    "grpo": ("method=grpo", ["method=grpo"]),
    "opd": ("method=opd", ["method=opd"]),
}
# A self-teacher is the student's own start; its rows are the demo's with the answer or a hint.
_SELF = ["teacher.path=configs/demo/student", "eval.teacher=false"]
METHODS: Runs = {
    "sod": ("SOD", ["method=sod"]),
    "sod_no_grpo": ("SOD without GRPO", ["method=sod_no_grpo"]),
    "sod_no_cap": ("SOD, w_k without cap", ["method=sod_no_cap"]),
    "sod_running_clip": ("SOD, running clip", ["method=sod_running_clip"]),
    "sod_heuristic": ("0.9 per step after an error", ["method=sod_heuristic"]),
    "sod_mask_after_wrong": ("nothing after an error", ["method=sod_mask_after_wrong"]),
    "opd": ("OPD", ["method=opd"]),
    "opd_naive": ("OPD without GRPO", ["method=opd_naive"]),
    "opsd_gt": ("OPSD, answer", ["method=opsd_gt", *_SELF]),
    "opsd_hint": ("OPSD, hint", ["method=opsd_hint", *_SELF]),
    "grpo": ("GRPO", ["method=grpo"]),
    "sod_sampled": ("SOD, sampled_advantage", ["method=sod", "distill.loss=sampled_advantage"]),
    "sod_separate": ("SOD, sampled_separate", ["method=sod", "distill.loss=sampled_separate"]),
    "sod_forward_kl": ("SOD, forward_kl", ["method=sod", "distill.loss=forward_kl"]),
    "sod_jsd": ("SOD, jsd", ["method=sod", "distill.loss=jsd"]),
    "sod_withdrawn": (
        "SOD, teacher withdrawn over iterations 20 to 40",
        ["method=sod", "distill.withdraw={start_iteration: 20, end_iteration: 40}"],
    ),
}


@dataclass(frozen=True)
class Table:
    """Runs that stand on one page."""

    name: str
    runs: Runs
    page: str  # below the repository's root
    title: str
    command: str

    def run_name(self, name: str) -> str:
        return f"table-{self.name}-{name}"


TABLES = {
    table.name: table
    for table in (
        Table(
            "demo",
            SEEDS_AND_CONTROLS,
            "docs/demo_results.md",
            "Results of the demo",
            "make demo-controls",
        ),
        Table(
            "methods",
            METHODS,
            "docs/methods_results.md",
            "Every method on the demo's world",
            "make methods-table",
        ),
    )
}


def run_demo(root: Path, name: str, overrides: Sequence[str]) -> int:
    """Run the demo on two ranks as `runs/NAME` below `root`; the exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "tools/train_sod.py", "--config", "configs/demo_cpu.yaml"]
    command += [f"name={name}", "train.resume=never", *overrides]
    print(" ".join(command[3:]), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=root, env=environment).returncode
