"""Rollouts one iteration ahead against strictly on-policy ones, on the demo, alternating.

python tools/overlap_benchmark.py [--seeds 0,1,2] [--out FILE] [key=value ...]

Writes seconds per iteration, importance weights and success to docs/benchmarks/overlap.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 2  # iterations left out of the times; so is the last, which rolls nothing out ahead


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/overlap.md")
    parser.add_argument("overrides", nargs="*", help="dotted key=value for every run")
    given = parser.parse_args()
    runs = [(int(seed), staleness) for seed in given.seeds.split(",") for staleness in (0, 1)]
    results = {run: measure(*run, given.overrides) for run in runs}
    given.out.write_text("\n".join(table(results, given.overrides)) + "\n")
    print(given.out.read_text())


def measure(seed: int, staleness: int, overrides: list[str]) -> dict:
    """One run of the demo; its numbers."""
    name = f"overlap-{staleness}-seed{seed}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "tools/train_sod.py", "--config", "configs/demo_cpu.yaml"]
    command += [f"name={name}", f"seed={seed}", f"rollout.max_staleness={staleness}"]
    command += ["train.resume=never", "eval.teacher=false", *overrides]
    print(" ".join(command[3:]), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    rows = [json.loads(line) for line in (ROOT / f"runs/{name}/metrics.jsonl").open()]
    summary = json.loads((ROOT / f"runs/{name}/summary.json").read_text())
    phases = ("rollout", "score", "train", "transfer", "record")
    times = [sum(row.get(f"time/{p}_s", 0.0) for p in phases) for row in rows[WARM_UP:-1]]
    if not times:
        sys.exit(f"{name}: {len(rows)} iterations; at least {WARM_UP + 2} are needed for a time")
    used = [row for row in rows if "actor/importance" in row]
    weights = ["-"] * 3
    if used:
        mean, clipped = (
            statistics.mean(row[f"actor/importance{end}"] for row in used)
            for end in ("", "_clipped")
        )
        largest = max(row["actor/importance_max"] for row in used)
        weights = [f"{mean:.3f}", f"{largest:.2f}", f"{clipped:.2%}"]
    low, high = summary["student_after_interval"]
    success = f"{summary['student_after']:.1%} [{low:.1%}, {high:.1%}]"
    gap = f"{statistics.mean(row['actor/engine_gap'] for row in rows):.4f}"
    seconds = statistics.median(times)
    cells = [str(seed), str(staleness), f"{seconds:.2f}", success, gap, *weights]
    return {"s": seconds, "after": summary["student_after"], "cells": cells}


def table(results: dict[tuple[int, int], dict], overrides: list[str]) -> list[str]:
    ratios = [r["s"] / results[seed, 0]["s"] for (seed, k), r in results.items() if k == 1]
    finals = {k: [r["after"] for (_, j), r in results.items() if j == k] for k in (0, 1)}
    means = " and ".join(f"{statistics.mean(finals[k]):.1%}" for k in (0, 1))
    return [
        "# Rollouts one iteration ahead",
        "",
        f"Made by `tools/overlap_benchmark.py {' '.join(overrides)}` on {date.today()}. Median",
        "seconds per iteration without saving and evaluation; success with its 95 % interval.",
        "",
        "| seed | max_staleness | s/iteration | success | engine gap, nats | importance mean | max "
        "| at the cap |",
        "|---|---|---|---|---|---|---|---|",
        *("| " + " | ".join(r["cells"]) + " |" for r in results.values()),
        "",
        f"Time ratio, staleness 1 over 0: {', '.join(f'{x:.2f}' for x in ratios)} by seed, mean "
        f"{statistics.mean(ratios):.2f}. Mean success with staleness 0 and 1: {means}.",
    ]


if __name__ == "__main__":
    main()
