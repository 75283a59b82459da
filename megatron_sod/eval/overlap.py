"""What rolling out one iteration ahead gains and costs on the demo."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from megatron_sod.errors import DataError
from megatron_sod.eval.demo import run_demo
from megatron_sod.observe.run_dir import read_rows

WARM_UP = 2  # iterations left out of the times; so is the last, which rolls nothing out ahead
PHASES = ("rollout", "score", "train", "transfer", "record")


def compare(
    root: Path, seeds: Sequence[int], overrides: Sequence[str], *, reuse: bool = False
) -> list[str]:
    """Run every seed with staleness 0 and 1, alternating; the lines of the page.

    Args:
        reuse: take finished runs of these names below `root` as they are.
    Raises:
        DataError: a run failed, or is too short to be timed.
    """
    results = {}
    for seed in seeds:
        for staleness in (0, 1):
            name = f"overlap-{staleness}-seed{seed}"
            options = [f"seed={seed}", f"rollout.max_staleness={staleness}", "eval.teacher=false"]
            is_there = reuse and (root / "runs" / name / "summary.json").is_file()
            if not is_there and (status := run_demo(root, name, [*options, *overrides])):
                raise DataError(f"{name}: the run ended with status {status}; see above")
            results[seed, staleness] = measured(root / "runs" / name, seed, staleness)
    return table(results, overrides)


def measured(run: Path, seed: int, staleness: int) -> dict:
    """Numbers of one run folder: {"s": seconds per iteration, "after": success, "cells": ...}."""
    rows = read_rows(run / "metrics.jsonl")
    summary = json.loads((run / "summary.json").read_text())
    times = [sum(row.get(f"time/{p}_s", 0.0) for p in PHASES) for row in rows[WARM_UP:-1]]
    if not times:
        raise DataError(
            f"{run.name}: {len(rows)} iterations; at least {WARM_UP + 2} are needed for a time"
        )
    low, high = summary["student_after_interval"]
    success = f"{summary['student_after']:.1%} [{low:.1%}, {high:.1%}]"
    gap = f"{statistics.mean(row['actor/engine_gap'] for row in rows):.4f}"
    seconds = statistics.median(times)
    cells = [str(seed), str(staleness), f"{seconds:.2f}", success, gap, *_importance(rows)]
    return {"s": seconds, "after": summary["student_after"], "cells": cells}


def _importance(rows: list[dict]) -> list[str]:
    """Mean, largest and clipped share of the importance weights; dashes where there are none."""
    used = [row for row in rows if "actor/importance" in row]
    if not used:
        return ["-"] * 3
    mean, clipped = (
        statistics.mean(row[f"actor/importance{end}"] for row in used) for end in ("", "_clipped")
    )
    largest = max(row["actor/importance_max"] for row in used)
    return [f"{mean:.3f}", f"{largest:.2f}", f"{clipped:.2%}"]


def table(results: dict[tuple[int, int], dict], overrides: Sequence[str]) -> list[str]:
    """The page. `results`: by seed and staleness, as `measured` gives them."""
    ratios = [r["s"] / results[seed, 0]["s"] for (seed, k), r in results.items() if k == 1]
    finals = {k: [r["after"] for (_, j), r in results.items() if j == k] for k in (0, 1)}
    means = " and ".join(f"{statistics.mean(finals[k]):.1%}" for k in (0, 1))
    return [
        "# Rollouts one iteration ahead",
        "",
        f"Made by `{' '.join(['tools/overlap_benchmark.py', *overrides])}` on {date.today()}.",
        "Trainers and engine share two CPU cores. Median seconds per iteration without saving and",
        "evaluation; success with its 95 % interval.",
        "",
        "| seed | max_staleness | s/iteration | success | engine gap, nats | importance mean | max "
        "| at the cap |",
        "|---|---|---|---|---|---|---|---|",
        *("| " + " | ".join(r["cells"]) + " |" for r in results.values()),
        "",
        f"Time ratio, staleness 1 over 0: {', '.join(f'{x:.2f}' for x in ratios)} by seed, mean "
        f"{statistics.mean(ratios):.2f}. Mean success with staleness 0 and 1: {means}.",
    ]
