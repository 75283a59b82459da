"""Recorded rollouts come back as they were.

Layer: pure, files in a temporary folder. Training on a replay: tests/end_to_end/test_tiny_run.py.
"""

from dataclasses import fields, replace

import pyarrow.parquet as parquet
import pytest

from megatron_sod.errors import DataError
from megatron_sod.rollout.recording import Recording, schema
from megatron_sod.types import Step, Trajectory
from tests.helpers.tiny import synthetic_trajectories

TRAJECTORIES = synthetic_trajectories(3, 2, vocab_size=151_936, seed=4)


def test_every_field_comes_back_bit_for_bit(tmp_path):
    odd = replace(
        TRAJECTORIES[0],
        rollout_logprobs=[-1 / 3] * len(TRAJECTORIES[0].loss_mask),
        score=1 / 3,
    )
    empty = replace(
        TRAJECTORIES[1],
        response_token_ids=[],
        loss_mask=[],
        step_ids=[],
        rollout_logprobs=[],
        policy_versions=[],
        steps=(),
    )
    stored = [odd, empty, *TRAJECTORIES[2:]]
    Recording(tmp_path).write(1, stored)
    read = Recording(tmp_path).read(1)
    assert len(read) == len(stored)
    for before, after in zip(stored, read, strict=True):
        assert repr(after) == repr(before)  # NaN, as a lost trajectory has it, equals nothing


def test_the_table_has_every_field_of_a_trajectory():
    assert schema().names == [field.name for field in fields(Trajectory)]
    step = schema().field("steps").type.value_type
    assert [step.field(i).name for i in range(step.num_fields)] == [f.name for f in fields(Step)]


def test_a_recording_with_a_gap_is_refused_with_what_to_do(tmp_path):
    recording = Recording(tmp_path / "rollouts")
    for iteration in (1, 3):
        recording.write(iteration, TRAJECTORIES)
    recording.check_complete(1)
    with pytest.raises(DataError, match="iteration 2 of 3 was not recorded; lower"):
        recording.check_complete(3)


def test_a_recording_from_before_a_field_existed_is_refused_by_the_fields_name(tmp_path):
    """Read as it is, the field would be None and fail far from its cause."""
    recording = Recording(tmp_path)
    recording.write(1, TRAJECTORIES)
    path = tmp_path / "iter_000001.parquet"
    parquet.write_table(parquet.read_table(path).drop_columns(["score"]), path)
    with pytest.raises(DataError, match="iter_000001.*another version, without score; record"):
        recording.read(1)


def test_a_damaged_file_is_named(tmp_path):
    recording = Recording(tmp_path)
    recording.write(1, TRAJECTORIES)
    path = tmp_path / "iter_000001.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="iter_000001.parquet: not a table of recorded"):
        recording.read(1)
    with pytest.raises(DataError, match="iter_000002.parquet"):
        recording.read(2)
