"""Run folders made by hand, for the tests of the report."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import pyarrow
import pyarrow.parquet
import yaml

from tests.helpers.tokenizers import tiny_tokenizer

EVIL = "<script>globalThis.hacked = 1</script>\"'><img src=x onerror=hacked=2>&amp;</script>"
OUTCOMES = ("ok", "user_error", "timeout", "malformed", "infra_error", "none")


def ids(text: str) -> list[int]:
    return list(_ids(text))


@cache
def _ids(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def trajectory(iteration: int = 1, sample: int = 0, **changes) -> dict:
    """Two steps: a call whose result is hostile text, and an answer."""
    call = ids('<tool_call>\n{"name": "code_interpreter", "arguments": {"code": "print(1)"}}\n'
               "</tool_call><|im_end|>")  # fmt: skip
    observation, answer = ids(f"<tool_response>\n{EVIL}\n</tool_response>"), ids("done")
    student = len(call) + len(answer)
    return {
        "iteration": iteration,
        "trajectory": f"tiny_world:train:1/{iteration}/{sample}",
        "prompt_token_ids": ids("question " + EVIL),
        "response_token_ids": call + observation + answer,
        "step_ids": [1] * len(call) + [0] * len(observation) + [2] * len(answer),
        "log_ratios": [-2.5] + [0.75] * (student - 1),
        "student_logprobs": [-0.5] * student,
        "reward": 1.0,
        "finish_reason": "answer",
        "outcomes": ["user_error", "none"],
        "d": [0.3, 1.2],
        "w": [1.0, 0.25],
        **changes,
    }


def step_rows(row: dict) -> list[dict]:
    """What steps.parquet holds of a trajectory."""
    return [
        {
            "iteration": row["iteration"],
            "trajectory": row["trajectory"],
            "step": k + 1,
            "tokens": row["step_ids"].count(k + 1),
            "tool_outcome": outcome,
            "d_k": row["d"][k] if row["d"] else None,
            "w_k": row["w"][k] if row["w"] else None,
            "reward": row["reward"],
            "advantage": 0.5,
            "finish_reason": row["finish_reason"],
        }
        for k, outcome in enumerate(row["outcomes"])
    ]


def lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_steps(run: Path, iteration: int, rows: list[dict]) -> None:
    (run / "steps.parquet").mkdir(exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, run / f"steps.parquet/iter_{iteration:06d}.parquet")


def small_run(run: Path, *, iterations: int = 3, policy: str = "sod") -> Path:
    """Metrics, evaluations, a summary and one trajectory per iteration."""
    run.mkdir(parents=True)
    lines(run / "metrics.jsonl", [metrics_row(i) for i in range(1, iterations + 1)])
    sources = {name: {"num_samples": 1, "avg@1": x} for name, x in (("aime", 0.25), (EVIL, 1.0))}
    evaluation = {"success": 0.5, "interval": [0.4, 0.6], "num_prompts": 9, "sources": sources}
    lines(
        run / "evals.jsonl",
        [
            {"model": "student", "iteration": 0, **evaluation},
            {"model": "teacher", "iteration": 0, **evaluation},
            {"model": "student", "iteration": iterations, **evaluation, "success": 0.75},
        ],
    )
    kept = [trajectory(i) for i in range(1, iterations + 1)]
    lines(run / "trajectories.jsonl", kept)
    for row in kept:
        write_steps(run, row["iteration"], step_rows(row))
    summary = {"method": EVIL, "seed": 0, "iterations": iterations, "tokens": 99, "wall_s": 1.5}
    (run / "summary.json").write_text(json.dumps(summary))
    weight = {"policy": policy, "delta": 0.2, "epsilon": 1e-6, "d_floor": None, "w_min": None}
    config = {"name": run.name, "distill": {"step_weight": weight}, "evil": EVIL}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def metrics_row(iteration: int) -> dict:
    return {
        "iteration": iteration,
        "rollout/reward_mean": iteration / 3,
        "sod/w_mean": 1.0,
        "sod/d_step_1": 0.2,
        "tool/ok_rate": 0.9,
        "tool/user_error_rate": 0.1,
        "time/rollout_s": 2.0,
        "memory/host_rss_gb": 1.5,
    }


def large_run(run: Path, num_trajectories: int, *, per_iteration: int, text_every: int) -> Path:
    """Random steps of every outcome and length; every `text_every`-th trajectory has its text."""
    rng = random.Random(0)
    small_run(run, iterations=num_trajectories // per_iteration)
    kept = []
    for iteration in range(1, num_trajectories // per_iteration + 1):
        rows = []
        for sample in range(per_iteration):
            num_steps = rng.randint(1, 6)
            outcomes = [rng.choice(OUTCOMES) for _ in range(num_steps)]
            d = [None if rng.random() < 0.05 else rng.expovariate(3) for _ in outcomes]
            row = trajectory(iteration, sample, outcomes=outcomes, d=d, w=[1.0] * num_steps)
            row["step_ids"] = [1 + t * num_steps // 40 for t in range(40)]
            row["response_token_ids"] = [rng.randrange(20, 300) for _ in range(40)]
            row["log_ratios"] = row["student_logprobs"] = [-rng.random() for _ in range(40)]
            rows += step_rows(row)
            if sample % text_every == 0:
                kept.append(row)
        write_steps(run, iteration, rows)
    lines(run / "trajectories.jsonl", kept)
    return run
