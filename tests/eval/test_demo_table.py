"""A run has a row whatever became of it, with the numbers that explain its result.

Layer: pure, over run folders written by hand; the runs themselves: `make methods-table`.
"""

import json

import pytest

from megatron_sod.config.load import load_config
from megatron_sod.errors import DataError
from megatron_sod.eval import overlap
from megatron_sod.eval.demo import METHODS, TABLES
from megatron_sod.eval.demo_table import HEADER, run_cells, table_page
from tests.helpers.launch import ROOT

TABLE = TABLES["methods"]
BASE = ROOT / "configs/demo_cpu.yaml"


def _write(run, metrics, evals, *, alarms=(), wall_s=None):
    run.mkdir(parents=True)
    for name, rows in (("metrics", metrics), ("evals", evals), ("alarms", alarms)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run / f"{name}.jsonl").write_text(text)
    (run / "config.yaml").write_text("train: {num_iterations: 12}\n")
    if wall_s is not None:
        last = {"student_after": evals[-1]["success"], "student_after_interval": [0.5, 0.75]}
        (run / "summary.json").write_text(json.dumps({"wall_s": wall_s, **last}))


def _metrics(count, **extra):
    return [
        {"iteration": i, "rollout/tool_calls_avg": float(i), "actor/student_entropy": 0.5,
         "rollout/infra_error_rate": 0.25 if i == 1 else 0.0, "rollout/tokens": 100.0, **extra}
        for i in range(1, count + 1)
    ]  # fmt: skip


def _eval(iteration, success, model="student"):
    return {"model": model, "iteration": iteration, "success": success, "interval": [0.0, 1.0]}


def _row(run) -> dict[str, str]:
    return dict(zip(HEADER[1:], run_cells(run), strict=True))


def test_an_evaluation_that_infrastructure_spoilt_is_no_result(tmp_path):
    lost = {"success": None, "interval": None}
    evals = [_eval(0, None, "teacher"), _eval(0, 0.25), _eval(12, None)]
    evals = [row | lost if row["success"] is None else row for row in evals]
    _write(tmp_path / "run", _metrics(12), evals)
    row = _row(tmp_path / "run")
    assert row["before"].startswith("25.0%")
    assert row["after"] == row["gain, points"] == row["teacher"] == "-"


def test_a_complete_run_shows_what_it_reached_and_how(tmp_path):
    evals = [_eval(0, 1.0, "teacher"), _eval(0, 0.25), _eval(10, 0.5), _eval(12, 0.75)]
    metrics = _metrics(12, **{"sod/w_mean": 0.875, "sod/d_mean": 0.125})
    _write(tmp_path / "run", metrics, evals, wall_s=61.4)
    row = _row(tmp_path / "run")
    assert row["before"].startswith("25.0%") and row["after"].startswith("75.0%")
    assert (row["gain, points"], row["teacher"]) == ("+50.0", "100.0%")
    assert row["tool calls"] == "3.00 -> 10.00"  # 1..5 and 8..12
    assert (row["mean w_k"], row["d_k, nats"]) == ("0.88", "0.12 -> 0.12")
    assert row["lost"] == "2.1%"  # a quarter of one iteration in twelve
    assert (row["ended"], row["tokens"], row["wall, s"]) == ("complete", "1200", "61")


def test_a_run_the_watchdog_stopped_says_where_and_why(tmp_path):
    alarm = {"signal": "min_tool_calls_share", "since": 6, "iteration": 7}
    _write(tmp_path / "run", _metrics(7), [_eval(0, 0.5)], alarms=[alarm])
    row = _row(tmp_path / "run")
    assert row["ended"] == "not complete: 7 of 12; min_tool_calls_share since 6"
    assert (row["wall, s"], row["mean w_k"], row["iterations"]) == ("-", "-", "7")


@pytest.mark.parametrize("iterations", [(0,), (0, 0)])
def test_a_run_without_a_later_evaluation_has_no_result(tmp_path, iterations):
    """Its start is not what it reached."""
    _write(tmp_path / "run", _metrics(7), [_eval(i, 0.5) for i in iterations])
    row = _row(tmp_path / "run")
    assert row["before"].startswith("50.0%")
    assert (row["after"], row["gain, points"]) == ("-", "-")


def test_the_page_says_what_its_rows_inherit_and_where_that_is_not_the_papers(tmp_path):
    given = ["distill.loss=jsd", "distill.step_weight.epsilon=0.125"]
    head = table_page(TABLE, tmp_path, load_config(BASE, given)).split("\n| run")[0]
    head = " ".join(head.split())
    assert "`distill.loss: jsd` (the paper's: `sampled_advantage`)" in head
    assert "`distill.step_weight.epsilon: 0.125` (the paper's: `1e-06`)" in head
    same = ["distill.loss=sampled_advantage", "distill.step_weight.epsilon=1e-6"]
    assert "the paper's" not in table_page(TABLE, tmp_path, load_config(BASE, same))


def test_alarms_and_rollbacks_of_a_complete_run_are_shown(tmp_path):
    alarms = [{"signal": "min_step_weight", "since": 4, "iteration": 5},
              {"iteration": 5, "back_to": 2}]  # fmt: skip
    _write(tmp_path / "run", _metrics(12), [_eval(0, 0.5)], alarms=alarms, wall_s=9.0)
    assert _row(tmp_path / "run")["ended"] == "complete; min_step_weight since 4; taken back to 2"


def test_every_run_of_the_table_has_a_row(tmp_path):
    _write(tmp_path / TABLE.run_name("grpo"), _metrics(3), [])
    text = table_page(TABLE, tmp_path, load_config(BASE))
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(METHODS) and all(r.count("|") == len(HEADER) + 1 for r in rows)
    assert sum("never started" in row for row in rows) == len(METHODS) - 1
    (grpo,) = [row for row in rows if row.startswith("| GRPO |")]
    assert "not complete: 3 of 12" in grpo


def test_the_page_names_the_commits_its_runs_were_made_by(tmp_path):
    for name, versions in (("sod", {"commit": "b1"}), ("opd", {"commit": "a0"}), ("grpo", {})):
        _write(run := tmp_path / TABLE.run_name(name), _metrics(3), [])
        (run / "versions.json").write_text(json.dumps(versions))
    assert "Made by commit a0, b1." in table_page(TABLE, tmp_path, load_config(BASE))


def test_overlap_is_timed_without_warm_up_and_the_last_iteration(tmp_path):
    times = [50.0, 50.0, 1.0, 2.0, 6.0, 90.0]
    metrics = [{"time/rollout_s": t, "time/eval_s": 7.0, "actor/engine_gap": 0.0} for t in times]
    metrics[3] |= {"actor/importance": 1.5, "actor/importance_max": 2.0}
    metrics[3]["actor/importance_clipped"] = 0.25
    _write(tmp_path / "run", metrics, [_eval(0, 0.5)], wall_s=9.0)
    result = overlap.measured(tmp_path / "run", 0, 1)
    assert result["s"] == 2.0 and result["cells"][-3:] == ["1.500", "2.00", "25.00%"]
    results = {(0, 0): {**result, "s": 4.0}, (0, 1): result}
    assert "1 over 0: 0.50 by seed" in overlap.table(results, [])[-1]


def test_a_run_too_short_to_be_timed_is_refused(tmp_path):
    _write(tmp_path / "run", [{"actor/engine_gap": 0.0}] * 3, [_eval(0, 0.5)], wall_s=9.0)
    with pytest.raises(DataError, match="at least 4 are needed"):
        overlap.measured(tmp_path / "run", 0, 0)
