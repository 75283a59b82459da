"""What is left when a run ends: summary.json, the report, and a few printed lines."""

from __future__ import annotations

from typing import Any

from megatron_sod.config.schema import SodConfig
from megatron_sod.observe.progress import say
from megatron_sod.observe.report import write_report
from megatron_sod.observe.run_dir import RunDir

PHASES = ("rollout", "score", "train", "transfer", "record", "save", "eval")


def finish_run(run_dir: RunDir, config: SodConfig, tokenizer: Any, *, wall_s: float) -> dict:
    """Write summary.json and report.html; print both for the person watching."""
    summary = summarise_run(run_dir, config, wall_s=wall_s)
    run_dir.write_json("summary.json", summary)
    report = write_report(run_dir.path, tokenizer)
    for line in summary_lines(summary):
        say(line)
    say(f"report: {report}")
    return summary


def summarise_run(run_dir: RunDir, config: SodConfig, *, wall_s: float) -> dict:
    """Fractions before and after, budget spent, seconds per phase."""
    metrics, evals = run_dir.rows("metrics.jsonl"), run_dir.rows("evals.jsonl")
    student = [row for row in evals if row["model"] == "student"]
    teacher = [row for row in evals if row["model"] == "teacher"]
    phases = {p: sum(row.get(f"time/{p}_s", 0.0) for row in metrics) for p in PHASES}
    summary: dict[str, Any] = {
        "name": config.name,
        "method": config.method,
        "seed": config.seed,
        "iterations": len(metrics),
        "tokens": int(sum(row.get("rollout/tokens", 0.0) for row in metrics)),
        "wall_s": round(wall_s, 1),
        "phase_s": {name: round(value, 1) for name, value in phases.items()},
        "report": str(run_dir.path / "report.html"),
    }
    for name, rows, at in (
        ("student_before", student, 0),
        ("student_after", student, -1),
        ("teacher", teacher, -1),
    ):
        if rows and rows[at]["success"] is not None:  # else infrastructure spoilt it
            summary[name] = rows[at]["success"]
            summary[f"{name}_interval"] = rows[at]["interval"]
            summary["num_eval_tasks"] = rows[at]["num_prompts"]
    return summary


def summary_lines(summary: dict) -> list[str]:
    """The summary as a person reads it."""
    lines = []
    for name in ("student_before", "student_after", "teacher"):
        if name in summary:
            low, high = summary[f"{name}_interval"]
            lines.append(f"{name:>15}  {summary[name]:6.1%}  [{low:.1%}, {high:.1%}]")
    phases = ", ".join(f"{name} {value:.0f}" for name, value in summary["phase_s"].items())
    lines.append(
        f"{summary['iterations']} iterations, {summary['tokens']} rollout tokens, "
        f"{summary['wall_s']:.0f} s ({phases} s)"
    )
    return lines
