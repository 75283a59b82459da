"""The files of a run: written whole, read after a kill, cut back on resume.

Layer: pure, with a temporary folder. Resuming a killed run: tests/end_to_end.
"""

import json
import re
import subprocess

import pyarrow.parquet
import pytest
import torch.distributed as dist

from megatron_sod.errors import ConfigError
from megatron_sod.observe import run_dir
from megatron_sod.observe.run_dir import RunDir, versions
from tests.helpers.tiny import sod_config


@pytest.fixture
def run(tmp_path):
    config = sod_config("s", "t", name="r1", observe={"run_dir": str(tmp_path / "{name}")})
    directory = RunDir(config)
    directory.prepare(config)
    return directory


def test_the_folder_is_named_by_the_configuration(run, tmp_path):
    assert run.path == tmp_path / "r1"
    assert {p.name for p in run.path.iterdir()} == {"config.yaml", "versions.json"}


def test_rows_come_back_as_written(run):
    rows = [{"iteration": 1, "x": 0.5}, {"iteration": 2, "text": "\u00fc\n"}]
    for row in rows:
        run.append("metrics.jsonl", row)
    assert run.rows("metrics.jsonl") == rows and run.rows("evals.jsonl") == []


def test_a_line_cut_short_by_a_kill_is_dropped(run):
    run.append("metrics.jsonl", {"iteration": 1})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 2, "x"')
    assert run.rows("metrics.jsonl") == [{"iteration": 1}]
    run.drop_after(1)
    run.append("metrics.jsonl", {"iteration": 2})
    assert [row["iteration"] for row in run.rows("metrics.jsonl")] == [1, 2]


def test_a_broken_line_in_the_middle_is_an_error(run):
    (run.path / "metrics.jsonl").write_text('{"iteration": 1\n{"iteration": 2}\n')
    with pytest.raises(json.JSONDecodeError):
        run.rows("metrics.jsonl")


def test_rows_of_iterations_to_be_done_again_are_dropped(run):
    for name in ("metrics.jsonl", "evals.jsonl", "trajectories.jsonl"):
        for iteration in (0, 1, 2, 3):
            run.append(name, {"iteration": iteration})
    for iteration in (1, 2, 3):
        run.write_steps(iteration, [{"iteration": iteration, "step": 1}])
        run.rollouts.mkdir(exist_ok=True)
        (run.rollouts / f"iter_{iteration:06d}.parquet").touch()
    run.drop_after(2)
    assert not list(run.path.glob("*.partial"))
    assert len(list(run.rollouts.iterdir())) == 2
    for name in ("metrics.jsonl", "evals.jsonl", "trajectories.jsonl"):
        assert [row["iteration"] for row in run.rows(name)] == [0, 1, 2]
    assert pyarrow.parquet.read_table(run.path / "steps.parquet")["iteration"].to_pylist() == [1, 2]


def test_iterations_with_and_without_divergences_read_as_one_table(run):
    row = {"iteration": 1, "step": 1, "d_k": 0.5, "w_k": 1.0}
    run.write_steps(1, [row])
    run.write_steps(2, [{**row, "iteration": 2, "d_k": None, "w_k": None}])
    table = pyarrow.parquet.read_table(run.path / "steps.parquet")
    assert table["d_k"].to_pylist() == [0.5, None]
    run.write_steps(0, [{**row, "iteration": 0, "d_k": None, "w_k": None}])  # read first
    table = pyarrow.parquet.read_table(run.path / "steps.parquet")
    assert table["w_k"].to_pylist() == [None, 1.0, None]


def test_json_is_replaced_whole(run):
    run.write_json("summary.json", {"a": 1})
    run.write_json("summary.json", {"b": 2})
    assert json.loads((run.path / "summary.json").read_text()) == {"b": 2}
    assert not list(run.path.glob("*.partial"))


def test_versions_name_what_decides_the_numbers():
    found = versions()
    assert {"python", "torch", "numpy", "transformers"} <= set(found)


def test_a_run_from_a_checkout_names_its_commit(monkeypatch, tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True)

    module = tmp_path / "megatron_sod" / "observe" / "run_dir.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    monkeypatch.setattr(run_dir, "__file__", str(module))
    assert "commit" not in versions()  # an installed package has no history
    git("init")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "one")
    clean = versions()["commit"]
    assert re.fullmatch("[0-9a-f]{12}", clean)
    module.write_text("changed")
    assert versions()["commit"] == f"{clean}-dirty"


def test_a_fresh_start_moves_an_earlier_run_aside_and_loses_nothing(tmp_path):
    run = RunDir.__new__(RunDir)
    run.path = tmp_path / "run"
    run.path.mkdir()
    run.append("evals.jsonl", {"model": "student", "iteration": 0})
    run.move_previous_aside()
    assert not run.path.exists()
    (aside,) = tmp_path.iterdir()
    assert (aside / "evals.jsonl").is_file()
    run.move_previous_aside()  # nothing there: nothing to do
    assert list(tmp_path.iterdir()) == [aside]


def test_machines_that_do_not_share_the_folder_are_named(run, monkeypatch):
    text = (run.path / "versions.json").read_text()

    def gathered(*others):
        def all_gather_object(seen, own):
            seen[:] = [own, *others]

        return all_gather_object

    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "all_gather_object", gathered(("b", text), ("b", text)))
    run.check_shared()
    elsewhere = text.replace('"started": "', '"started": "earlier ')
    monkeypatch.setattr(dist, "all_gather_object", gathered(("b", text), ("node-c", elsewhere)))
    with pytest.raises(ConfigError, match="r1 on node-c is not the folder.*file system they share"):
        run.check_shared()
    monkeypatch.setattr(dist, "all_gather_object", gathered(("node-d", ""), ("b", text)))
    with pytest.raises(ConfigError, match="r1 on node-d is not the folder"):
        run.check_shared()
