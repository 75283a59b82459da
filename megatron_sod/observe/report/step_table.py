"""steps.parquet as flat lists: one entry per trajectory, one per step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from megatron_sod.observe.patterns import PATTERNS, pattern_of

_COLUMNS = (
    "iteration",
    "trajectory",
    "tokens",
    "tool_outcome",
    "d_k",
    "w_k",
    "reward",
    "advantage",
    "finish_reason",
)
NAN = math.nan


@dataclass
class StepTable:
    """N trajectories in the order of their iterations, their steps behind each other."""

    ids: list[str] = field(default_factory=list)  # [N]
    iteration: list[int] = field(default_factory=list)  # [N]
    reward: list[float] = field(default_factory=list)  # [N]
    advantage: list[float] = field(default_factory=list)  # [N]
    finish: list[int] = field(default_factory=list)  # [N] into finish_names
    pattern: list[int] = field(default_factory=list)  # [N] into PATTERNS
    step_start: list[int] = field(default_factory=lambda: [0])  # [N + 1]: steps 0..3, 4..5: 0 4 6
    d: list[float] = field(default_factory=list)  # [M] nats, NaN where not scored
    w: list[float] = field(default_factory=list)  # [M]
    outcome: list[int] = field(default_factory=list)  # [M] into outcome_names
    tokens: list[int] = field(default_factory=list)  # [M] the student's
    outcome_names: list[str] = field(default_factory=list)
    finish_names: list[str] = field(default_factory=list)

    def add(self, rows: list[dict], epsilon: float) -> None:
        """One trajectory, its step rows in order."""
        head = rows[0]
        self.ids.append(head["trajectory"])
        self.iteration.append(head["iteration"])
        self.reward.append(_number(head["reward"]))
        self.advantage.append(_number(head["advantage"]))
        self.finish.append(_place(self.finish_names, head["finish_reason"]))
        self.pattern.append(PATTERNS.index(pattern_of([r["d_k"] for r in rows], epsilon=epsilon)))
        for row in rows:
            self.d.append(_number(row["d_k"]))
            self.w.append(_number(row["w_k"]))
            self.outcome.append(_place(self.outcome_names, row["tool_outcome"]))
            self.tokens.append(row["tokens"])
        self.step_start.append(len(self.d))


def read_step_table(
    folder: Path, kept: list[dict], *, epsilon: float, notes: list[str]
) -> StepTable:
    """Every trajectory of the run; those found only in trajectories.jsonl (`kept`) as well.

    A part that cannot be read (a kill while it was written) is left out and noted.
    """
    table, known = StepTable(), set[str]()
    for rows in _trajectories(folder, notes):
        table.add(rows, epsilon)
        known.add(rows[0]["trajectory"])
    for row in kept:
        if row["trajectory"] not in known and row["outcomes"]:
            table.add(_rows_of(row), epsilon)
    return table


def _trajectories(folder: Path, notes: list[str]):
    import pyarrow
    import pyarrow.parquet

    for part in sorted(folder.glob("iter_*.parquet")):
        try:
            columns = pyarrow.parquet.read_table(part, columns=list(_COLUMNS)).to_pydict()
        except (pyarrow.ArrowException, OSError) as error:
            notes.append(f"{part.name} could not be read and is left out: {error}")
            continue
        rows: list[dict] = []
        for values in zip(*(columns[name] for name in _COLUMNS), strict=True):
            row = dict(zip(_COLUMNS, values, strict=True))
            if rows and rows[0]["trajectory"] != row["trajectory"]:
                yield rows
                rows = []
            rows.append(row)
        if rows:
            yield rows


def _rows_of(kept: dict) -> list[dict]:
    """Step rows of a trajectory that only trajectories.jsonl has."""
    num_steps = len(kept["outcomes"])
    d, w = (kept[name] + [None] * (num_steps - len(kept[name])) for name in ("d", "w"))
    return [
        {
            **kept,
            "advantage": None,
            "tokens": kept["step_ids"].count(k + 1),
            "tool_outcome": kept["outcomes"][k],
            "d_k": d[k],
            "w_k": w[k],
        }
        for k in range(num_steps)
    ]


def _number(value: float | None) -> float:
    return NAN if value is None else value


def _place(names: list[str], name: str) -> int:
    if name not in names:
        names.append(name)
    return names.index(name)
