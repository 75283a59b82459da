"""tools/plan.py as a user types it. Layer: subprocesses, on the demo's configuration."""

import os
import subprocess
import sys

import pytest

from tests.helpers.launch import ROOT

DEMO = ["--config", "configs/demo_cpu.yaml", "train.train_batch_size=4"]


def _run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/plan.py", *arguments]
    environment = {**os.environ, "COLUMNS": "130"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def test_what_if_prints_a_row_for_every_variant():
    run = _run("what-if", *DEMO, "--gpus", "2,4")
    assert run.returncode == 0, run.stderr
    # two ranks share the model, so two GPUs cannot be divided between trainers and engines
    assert run.stdout.count("colocated") == 2 and run.stdout.count("disaggregated") == 2


def test_picture_writes_the_file(tmp_path):
    out = tmp_path / "picture.svg"
    assert _run("picture", *DEMO, "--out", str(out)).returncode == 0
    assert out.read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("compare", "/nowhere"), "metrics.jsonl: 0 iteration"),
        (("what-if", "--config", "/nowhere.yaml"), "/nowhere.yaml"),
    ],
)
def test_a_mistake_gives_one_clear_error(arguments, says):
    run = _run(*arguments)
    assert run.returncode == 1 and says in run.stderr and run.stderr.count("error:") == 1
