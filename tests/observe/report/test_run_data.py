"""The files of a run become the page's columns, whatever is missing.

Layer: pure, with files in a temporary folder.
"""

import json
import math

import numpy as np
import pytest

from megatron_sod.errors import DataError
from megatron_sod.observe.metrics import ERROR_OUTCOMES
from megatron_sod.observe.report.run_data import read_run
from megatron_sod.scoring.credit import WRONG_OUTCOMES
from tests.helpers.tokenizers import tiny_tokenizer
from tests.observe.report import runs


@pytest.fixture
def run(tmp_path):
    return runs.small_run(tmp_path / "demo")


def _read(run, **options):
    return read_run(run, tiny_tokenizer(), **options)


def test_every_trajectory_and_step_is_there(run):
    meta, columns = _read(run)
    assert meta["ids"] == [f"tiny_world:train:1/{i}/0" for i in (1, 2, 3)]
    assert columns["step_start"].tolist() == [0, 2, 4, 6]
    assert columns["d"].tolist()[:2] == pytest.approx([0.3, 1.2])
    assert [meta["outcomes"][o] for o in columns["outcome"][:2]] == ["user_error", "none"]
    assert [meta["patterns"][p] for p in columns["pattern"]] == ["erroneous"] * 3
    assert meta["notes"] == []


def test_what_counts_as_wrong_is_what_the_trainer_counts(run):
    assert set(ERROR_OUTCOMES) == WRONG_OUTCOMES
    meta, _ = _read(run)
    assert dict(zip(meta["outcomes"], meta["is_wrong"], strict=True)) == {
        "user_error": True,
        "none": False,
    }


def test_tokens_carry_what_both_models_said(run):
    _, columns = _read(run)
    first = slice(*columns["text_start"][:2])
    step, ratio = columns["step"][first], columns["log_ratio"][first]
    assert ratio[step > 0][:2].tolist() == [-2500, 750]  # 1/1000 nat
    assert set(ratio[step == 0].tolist()) == {-32768}
    assert set(columns["student_logprob"][first][step > 0].tolist()) == {-500}


def test_metrics_are_a_matrix_with_nan_where_a_row_lacks_the_name(run):
    runs.lines(run / "metrics.jsonl", [{"iteration": 1, "a/x": 1.0}, {"iteration": 5, "b/y": 2}])
    meta, columns = _read(run)
    assert meta["metric_names"] == ["a/x", "b/y"]
    assert columns["metric_iteration"].tolist() == [1, 5]
    np.testing.assert_array_equal(columns["metrics"], [1.0, math.nan, math.nan, 2.0])


FILES = ("metrics.jsonl", "evals.jsonl", "config.yaml", "trajectories.jsonl", "summary.json")


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_leaves_its_part_empty(run, missing):
    (run / missing).unlink()
    meta, columns = _read(run)
    assert len(meta["ids"]) == 3 and columns["text_of"].shape == (3,)


def test_a_folder_without_a_run_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(DataError, match="no run here.*give the folder"):
        _read(tmp_path)


def test_a_run_killed_while_it_wrote_is_read_up_to_there(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "rollout/rew')
    (run / "steps.parquet/iter_000003.parquet").write_bytes(b"PAR1 cut")
    meta, columns = _read(run)
    assert len(columns["metric_iteration"]) == 3
    assert "iter_000003.parquet could not be read" in meta["notes"][0]
    # its trajectory is still known from trajectories.jsonl
    assert meta["ids"][-1] == "tiny_world:train:1/3/0" and columns["d"].shape == (6,)


def test_a_run_without_teacher_has_steps_without_values(run):
    row = runs.trajectory(1, log_ratios=[], d=[], w=[])
    runs.lines(run / "trajectories.jsonl", [row])
    for i in (1, 2, 3):
        runs.write_steps(run, i, runs.step_rows(runs.trajectory(i, d=[], w=[])))
    meta, columns = _read(run)
    assert np.isnan(columns["d"]).all() and len(columns["d"]) == 6
    assert {meta["patterns"][p] for p in columns["pattern"]} == {"short"}
    assert set(columns["log_ratio"].tolist()) == {-32768}


def test_values_that_are_not_finite_reach_the_page_as_missing(run):
    ratios = runs.trajectory()["log_ratios"]
    row = runs.trajectory(1, log_ratios=[math.nan, math.inf, *ratios[2:]], reward=math.nan)
    runs.lines(run / "trajectories.jsonl", [row])
    summary = {"tokens": math.nan}
    (run / "summary.json").write_text(json.dumps(summary))
    meta, columns = _read(run)
    scored = columns["log_ratio"][columns["step"] > 0]
    assert scored[:2].tolist() == [-32768, -32768] and meta["summary"] == {"tokens": None}


def test_texts_beyond_the_budget_are_thinned_evenly_and_noted(run):
    rows = [runs.trajectory(i) for i in range(1, 41)]
    runs.lines(run / "trajectories.jsonl", rows)
    size = len(rows[0]["prompt_token_ids"]) + len(rows[0]["response_token_ids"])
    meta, columns = _read(run, max_text_tokens=10 * size)
    with_text = [i for i, row in enumerate(columns["text_of"]) if row >= 0]
    assert len(columns["piece"]) == 10 * size and len(meta["ids"]) == 40
    assert max(np.diff(with_text)) <= 5
    assert "texts of 30 of 40 kept trajectories" in meta["notes"][0]
