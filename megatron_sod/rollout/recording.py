"""Whole rollouts on disk: written while a run goes on, read back to train without any engine.

    RUN/rollouts/iter_000001.parquet     one row per trajectory, in the order it was trained on

Token ids, masks, logprobs (float64) and rewards come back bit for bit, so a replayed run computes
what the recorded one did.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from megatron_sod.errors import DataError
from megatron_sod.types import Step, Trajectory


class Recording:
    """A folder with one table of trajectories per iteration."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def write(self, iteration: int, trajectories: list[Trajectory]) -> None:
        """Store one iteration; the file appears whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_trajectories(self._path(iteration), trajectories)

    def read(self, iteration: int) -> list[Trajectory]:
        """The trajectories of one iteration, in their order.

        Raises:
            DataError: the file is missing, damaged or of another version.
        """
        return read_trajectories(self._path(iteration))

    def check_complete(self, num_iterations: int) -> None:
        """Raises DataError unless iterations 1..num_iterations are all there."""
        for iteration in range(1, num_iterations + 1):
            if not self._path(iteration).is_file():
                raise DataError(
                    f"rollout.replay {self.folder}: iteration {iteration} of {num_iterations} was "
                    "not recorded; lower train.num_iterations, or record with rollout.record=true"
                )

    def _path(self, iteration: int) -> Path:
        return self.folder / f"iter_{iteration:06d}.parquet"


def write_trajectories(path: Path, trajectories: list[Trajectory]) -> None:
    """One Parquet file, renamed into place when it is complete."""
    import pyarrow
    import pyarrow.parquet

    partial = path.with_name(path.name + ".partial")
    table = pyarrow.Table.from_pylist([asdict(t) for t in trajectories], schema())
    pyarrow.parquet.write_table(table, partial, compression="zstd")
    partial.rename(path)


def read_trajectories(path: Path) -> list[Trajectory]:
    """What `write_trajectories` stored.

    Raises:
        DataError: the file is not one of ours, or lacks a column.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        missing = set(schema().names) - set(pyarrow.parquet.read_schema(path).names)
        if missing:
            raise DataError(
                f"{path}: recorded by another version, without {', '.join(sorted(missing))}; "
                "record the rollouts again with this one"
            )
        rows = pyarrow.parquet.read_table(path, schema=schema()).to_pylist()
        return [
            Trajectory(**{**row, "steps": tuple(Step(**step) for step in row["steps"])})
            for row in rows
        ]
    except (pyarrow.ArrowException, OSError, TypeError) as error:
        raise DataError(f"{path}: not a table of recorded trajectories ({error})") from error


def schema():
    """Arrow types of the table's columns: the fields of Trajectory."""
    import pyarrow as pa

    step = pa.struct(
        [
            ("step_id", pa.int32()),
            ("outcome", pa.string()),
            ("num_tokens", pa.int32()),
            ("num_tool_calls", pa.int32()),
        ]
    )
    return pa.schema(
        [
            ("trajectory_id", pa.string()),
            ("prompt_id", pa.string()),
            ("prompt_token_ids", pa.list_(pa.int32())),
            ("response_token_ids", pa.list_(pa.int32())),
            ("loss_mask", pa.list_(pa.bool_())),
            ("step_ids", pa.list_(pa.int32())),
            ("rollout_logprobs", pa.list_(pa.float64())),
            ("policy_versions", pa.list_(pa.int32())),
            ("steps", pa.list_(step)),
            ("finish_reason", pa.string()),
            ("reward", pa.float64()),
            ("policy_version", pa.int32()),
            ("score", pa.float64()),
            ("temperature", pa.float64()),
            ("top_p", pa.float64()),
        ]
    )
