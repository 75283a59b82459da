"""tools/import_config.py from script to a file that the trainer plans with.

Layer: subprocesses, without a GPU, an engine or a model file.
"""

import subprocess
import sys
from pathlib import Path

from tests.config.launch_scripts import SOD

ROOT = Path(__file__).resolve().parents[2]


def _run(tool: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, f"tools/{tool}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_the_recipes_script_becomes_a_configuration_that_can_be_planned(tmp_path):
    script, out = tmp_path / "run.sh", tmp_path / "mine.yaml"
    script.write_text(SOD)
    done = _run("import_config.py", str(script), "--num-prompts", "30128", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "trainer.a_key_of_tomorrow: unknown" in done.stderr and done.stdout == ""
    planned = _run("train_sod.py", "--config", str(out), "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "models/qwen3-1.7b" in planned.stdout and "1024 trajectories" in planned.stdout


def test_what_is_missing_is_listed_at_once_with_the_remedy(tmp_path):
    done = _run("import_config.py", "data.train_batch_size=64", "trainer.total_epochs=1")
    assert done.returncode == 1
    for words in ("student", "data.train", "train.num_iterations", "--set KEY=VALUE"):
        assert words in done.stderr
    assert "train_batch_size: 64" in done.stdout


def test_a_missing_script_is_one_line(tmp_path):
    done = _run("import_config.py", str(tmp_path / "none.sh"))
    assert done.returncode == 1 and "no such script" in done.stderr
    assert "Traceback" not in done.stderr
