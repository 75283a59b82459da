"""The files of one run -> the JSON and columns its page shows. Nothing is drawn here.

N trajectories, M their steps, I iterations, X trajectories with text, T their tokens.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_sod.errors import DataError
from megatron_sod.observe.metrics import ERROR_OUTCOMES
from megatron_sod.observe.patterns import PATTERNS, RULES
from megatron_sod.observe.reference_names import REFERENCE_NAMES
from megatron_sod.observe.report.step_table import StepTable, read_step_table
from megatron_sod.observe.report.text_table import text_columns
from megatron_sod.observe.run_dir import read_rows

MAX_TEXT_TOKENS = 8_000_000  # about 15 MB of page; beyond, texts are thinned evenly

RUN_FILES = ("metrics.jsonl", "evals.jsonl", "trajectories.jsonl", "steps.parquet", "config.yaml")
Columns = dict[str, np.ndarray]


def read_run(
    run_dir: str | Path, tokenizer: Any, *, max_text_tokens: int = MAX_TEXT_TOKENS
) -> tuple[dict[str, Any], Columns]:
    """Everything the page knows about a run; files that are missing leave their part empty.

    Args:
        tokenizer: turns ids into text; None shows the ids.
        max_text_tokens: texts beyond this many tokens are left out, and counted in `notes`.
    Raises:
        DataError: `run_dir` is no folder of a run.
    """
    run = Path(run_dir)
    if not any((run / name).exists() for name in RUN_FILES):
        raise DataError(
            f"{run}: no run here, none of {', '.join(RUN_FILES)}; give the folder that "
            "tools/train_sod.py wrote, e.g. runs/demo-seed0"
        )
    notes: list[str] = []
    config = _yaml(run / "config.yaml")
    kept = read_rows(run / "trajectories.jsonl")
    steps = read_step_table(run / "steps.parquet", kept, epsilon=_epsilon(config), notes=notes)
    texts, pieces = text_columns(kept, steps.ids, tokenizer, max_text_tokens, notes)
    names, metrics = _metrics(read_rows(run / "metrics.jsonl"))
    meta = {
        "name": run.name,
        "summary": _json(run / "summary.json"),
        "versions": _json(run / "versions.json"),
        "config": config,
        "evals": [_finite(row) for row in read_rows(run / "evals.jsonl")],
        "metric_names": names,
        "pieces": pieces,
        "notes": notes,
        "patterns": list(PATTERNS),
        "pattern_rules": RULES,
        **_labels(steps),
    }
    return _finite(meta), {**metrics, **_table(steps), **texts}


def _epsilon(config: dict) -> float:
    weight = (config.get("distill") or {}).get("step_weight") or {}
    return float(weight.get("epsilon", 1e-6))


def _labels(steps: StepTable) -> dict[str, Any]:
    return {
        "ids": steps.ids,
        "outcomes": steps.outcome_names,
        "is_wrong": [name in ERROR_OUTCOMES for name in steps.outcome_names],
        "finish_reasons": steps.finish_names,
    }


def _table(steps: StepTable) -> Columns:
    return {
        "iteration": np.array(steps.iteration, np.int32),
        "reward": np.array(steps.reward, np.float32),
        "advantage": np.array(steps.advantage, np.float32),
        "finish": np.array(steps.finish, np.uint8),
        "pattern": np.array(steps.pattern, np.uint8),
        "step_start": np.array(steps.step_start, np.int32),
        "d": np.array(steps.d, np.float32),
        "w": np.array(steps.w, np.float32),
        "outcome": np.array(steps.outcome, np.uint8),
        "step_tokens": np.array(steps.tokens, np.int32),
    }


def _metrics(rows: list[dict]) -> tuple[list[str], Columns]:
    """Names, and one float32 matrix [names, I] flattened; NaN where a row lacks the name. What
    stands under one of our names as well is not shown twice."""
    names = sorted({name for row in rows for name in row} - {"iteration", *REFERENCE_NAMES})
    matrix = np.full((len(names), len(rows)), np.nan, np.float32)
    for column, row in enumerate(rows):
        for place, name in enumerate(names):
            value = row.get(name)
            if isinstance(value, int | float):
                matrix[place, column] = value
    iterations = np.array([row.get("iteration", 0) for row in rows], np.int32)
    return names, {"metric_iteration": iterations, "metrics": matrix.reshape(-1)}


def _yaml(path: Path) -> dict:
    loaded = yaml.safe_load(path.read_text()) if path.is_file() else None
    return loaded if isinstance(loaded, dict) else {}


def _json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def _finite(value: Any) -> Any:
    """NaN and infinities are no JSON: null in the page."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
