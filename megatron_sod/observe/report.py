"""report.html: curves and a few trajectories step by step, one file, no network."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import jinja2

from megatron_sod.observe.run_dir import read_rows

_PANELS = (
    ("Success on held-out tasks", None, ()),
    ("Reward of rollouts", "reward", ("rollout/reward_mean",)),
    ("Step divergence d_k", "nats", tuple(f"sod/d_step_{k}" for k in range(1, 6))),
    ("Step weight w_k", "weight", ("sod/w_mean", "sod/w_p5", "sod/w_p50", "sod/w_p95")),
    (
        "Tool outcomes",
        "share",
        ("tool/ok_rate", "tool/user_error_rate", "tool/timeout_rate", "tool/malformed_rate"),
    ),
    ("Calls and turns", "per trajectory", ("rollout/tool_calls_avg", "rollout/num_turns")),
    ("Entropy", "nats", ("actor/student_entropy", "actor/teacher_entropy")),
    ("Gradient norm", "", ("actor/grad_norm",)),
    (
        "Seconds per iteration",
        "s",
        ("time/rollout_s", "time/score_s", "time/train_s", "time/transfer_s"),
    ),
)


def write_report(run_dir: str | Path, tokenizer: Any) -> Path:
    """Draw the run in `run_dir`. Returns the path of report.html."""
    run = Path(run_dir)
    metrics, evals = read_rows(run / "metrics.jsonl"), read_rows(run / "evals.jsonl")
    trajectories = read_rows(run / "trajectories.jsonl")
    last = trajectories[-1]["iteration"] if trajectories else 0
    shown = [row for row in trajectories if row["iteration"] in (1, last)][:16]
    summary_path = run / "summary.json"
    template = jinja2.Environment(autoescape=True).from_string(
        Path(__file__).with_name("report.html.jinja").read_text()
    )
    path = run / "report.html"
    path.write_text(
        template.render(
            name=run.name,
            summary=json.loads(summary_path.read_text()) if summary_path.is_file() else {},
            curves=_curves(metrics, evals),
            trajectories=[_trajectory(row, tokenizer) for row in shown],
        )
    )
    return path


def _curves(metrics: list[dict], evals: list[dict]) -> str:
    """All panels as one inline SVG."""
    from matplotlib.figure import Figure

    columns = 3
    figure = Figure(figsize=(12, 3 * math.ceil(len(_PANELS) / columns)), layout="constrained")
    for place, (title, unit, names) in enumerate(_PANELS):
        axes = figure.add_subplot(math.ceil(len(_PANELS) / columns), columns, place + 1)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("iteration", fontsize=8)
        if unit:
            axes.set_ylabel(unit, fontsize=8)
        axes.tick_params(labelsize=7)
        if unit is None:
            _success(axes, evals)
        for name in names:
            points = [(row["iteration"], row[name]) for row in metrics if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=name.split("/")[1], linewidth=1)
        if len(axes.lines) > 1:
            axes.legend(fontsize=6)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _success(axes, evals: list[dict]) -> None:
    student = [row for row in evals if row["model"] == "student"]
    if student:
        x = [row["iteration"] for row in student]
        axes.plot(x, [row["success"] for row in student], marker="o", label="student")
        low, high = zip(*[row["interval"] for row in student], strict=True)
        axes.fill_between(x, low, high, alpha=0.2)
    for row in evals:
        if row["model"] == "teacher":
            axes.axhline(row["success"], linestyle="--", color="gray", label="teacher")
    axes.set_ylim(0, 1)


def _trajectory(row: dict, tokenizer: Any) -> dict:
    """Segments of one trajectory: the student's steps token by token, the rest as text."""
    ratios = iter(row["log_ratios"] or [None] * sum(s > 0 for s in row["step_ids"]))
    segments: list[dict] = [
        {"step": 0, "text": tokenizer.decode(row["prompt_token_ids"]), "tokens": []}
    ]
    for token, step in zip(row["response_token_ids"], row["step_ids"], strict=True):
        if segments[-1]["step"] != step:
            segments.append({"step": step, "text": "", "tokens": []})
        text = tokenizer.decode([token])
        if step:
            segments[-1]["tokens"].append({"text": text, **_colour(next(ratios))})
        else:
            segments[-1]["text"] += text
    for segment in segments:
        if segment["step"]:
            at = segment["step"] - 1
            segment["outcome"] = row["outcomes"][at]
            segment["d"] = row["d"][at] if at < len(row["d"]) else None
            segment["w"] = row["w"][at] if at < len(row["w"]) else None
    return {**row, "segments": segments}


def _colour(log_ratio: float | None) -> dict:
    """Red where the teacher finds the token less likely than the student does, green where more."""
    if log_ratio is None:
        return {"style": "", "title": ""}
    strength = min(abs(log_ratio) / 3.0, 1.0) * 0.7
    hue = "40,160,80" if log_ratio > 0 else "220,60,60"
    return {
        "style": f"background:rgba({hue},{strength:.2f})",
        "title": f"log teacher/student {log_ratio:+.3f}",
    }
