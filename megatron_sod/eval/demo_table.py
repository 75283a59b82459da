"""Runs of the demo, one row each: what they reached, and how they trained on the way there.

A run that was stopped, failed, or was never started has a row that says so.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from statistics import fmean

from omegaconf import OmegaConf

from megatron_sod.config.schema import DistillConfig, SodConfig
from megatron_sod.eval.demo import Table
from megatron_sod.observe.run_dir import read_rows

EDGE = 5  # iterations at the start and at the end that "first -> last" is a mean of
HEADER = (
    "run", "before", "after", "gain, points", "teacher", "tool calls", "d_k, nats", "mean w_k",
    "entropy, nats", "lost", "ended", "iterations", "tokens", "wall, s",
)  # fmt: skip
LEGEND = f"""
`a -> b` are means over the first and the last {EDGE} iterations: tool calls per trajectory, the
step divergence d_k, and the student's entropy per token. `mean w_k` is over all iterations, `lost`
the share of trajectories that infrastructure spoilt; those teach nothing. `ended`: complete, or how
many iterations there were when it was stopped or failed (`after` is then its newest evaluation, or
`-` without one since the start); then each alarm of the watchdog with the
iteration it began at. The wall time is that of the whole run, on a machine that may have had other
work.
""".strip()


def table_page(table: Table, runs: Path, base: SodConfig) -> str:
    """The table's page from the run folders there are below `runs`.

    Args:
        base: the demo's configuration, which every run overrides a part of.
    """
    sampling = f"{base.eval.num_samples} sample(s) each, temperature {base.eval.temperature:g}"
    lines = [
        f"# {table.title}",
        "",
        f"Made by `{table.command}` on {date.today()}, two CPU cores. Success on held-out tasks,",
        f"{sampling}, with 95 % intervals; one seed unless it says so.",
        *_commits([runs / table.run_name(name) for name in table.runs]),
        "",
        *_inherited(base.distill),
        "",
        _line(HEADER),
        "|" + "---|" * len(HEADER),
    ]
    for name, (label, _) in table.runs.items():
        lines.append(_line([label, *run_cells(runs / table.run_name(name))]))
    return "\n".join([*lines, "", LEGEND]) + "\n"


def _commits(runs: list[Path]) -> list[str]:
    """What code the runs were made by, as far as they recorded it."""
    files = [run / "versions.json" for run in runs if (run / "versions.json").is_file()]
    found = {json.loads(file.read_text()).get("commit") for file in files} - {None}
    return [f"Made by commit {', '.join(sorted(found))}."] if found else []


def _inherited(distill: DistillConfig) -> list[str]:
    """Loss and epsilon of rows that name no other; the schema's defaults are the paper's."""
    paper = DistillConfig()
    values = {
        "loss": (distill.loss, paper.loss),
        "step_weight.epsilon": (distill.step_weight.epsilon, paper.step_weight.epsilon),
    }
    lines = ["What a row's name does not change it has from `configs/demo_cpu.yaml`:"]
    for name, (value, papers) in values.items():
        other = f" (the paper's: `{papers}`)" if value != papers else ""
        lines.append(f"`distill.{name}: {value}`{other},")
    return [*lines[:-1], lines[-1].rstrip(",") + "."]


def run_cells(run: Path) -> list[str]:
    """The cells of one run folder, in the order of HEADER after the first."""
    metrics, evals = read_rows(run / "metrics.jsonl"), read_rows(run / "evals.jsonl")
    if not metrics and not evals:
        return [*["-"] * (HEADER.index("ended") - 1), "never started", "-", "-", "-"]
    student = [row for row in evals if row["model"] == "student"]
    teacher = [row for row in evals if row["model"] == "teacher"]
    # a run stopped early may have no evaluation but that of its start
    after = student[-1:] if student and student[-1]["iteration"] > student[0]["iteration"] else []
    ends = [row["success"] for row in (*student[:1], *after)]
    gain = f"{100 * (ends[1] - ends[0]):+.1f}" if after and None not in ends else "-"
    summary = run / "summary.json"
    wall = json.loads(summary.read_text())["wall_s"] if summary.is_file() else None
    weights = _values(metrics, "sod/w_mean")
    return [
        _success(student[:1]),
        _success(after),
        gain,
        _success(teacher[-1:]).partition(" ")[0],
        _change(metrics, "rollout/tool_calls_avg"),
        _change(metrics, "sod/d_mean"),
        f"{fmean(weights):.2f}" if weights else "-",
        _change(metrics, "actor/student_entropy"),
        f"{fmean(_values(metrics, 'rollout/infra_error_rate') or [0.0]):.1%}",
        _ended(run, len(metrics), is_complete=wall is not None),
        str(len(metrics)),
        str(int(sum(_values(metrics, "rollout/tokens")))),
        f"{wall:.0f}" if wall is not None else "-",
    ]


def _success(rows: list[dict]) -> str:
    if not rows or rows[0]["success"] is None:  # infrastructure spoilt it
        return "-"
    low, high = rows[0]["interval"]
    return f"{rows[0]['success']:.1%} [{low:.1%}, {high:.1%}]"


def _change(metrics: list[dict], name: str) -> str:
    values = _values(metrics, name)
    if not values:
        return "-"
    return f"{fmean(values[:EDGE]):.2f} -> {fmean(values[-EDGE:]):.2f}"


def _values(metrics: list[dict], name: str) -> list[float]:
    return [row[name] for row in metrics if name in row]


def _ended(run: Path, num_done: int, *, is_complete: bool) -> str:
    words = ["complete"]
    if not is_complete:
        total = OmegaConf.load(run / "config.yaml").train.num_iterations
        words = [f"not complete: {num_done} of {total}"]
    for row in read_rows(run / "alarms.jsonl"):
        if "back_to" in row:
            words.append(f"taken back to {row['back_to']}")
        else:
            words.append(f"{row['signal']} since {row['since']}")
    return "; ".join(words)


def _line(cells) -> str:
    return "| " + " | ".join(cells) + " |"
