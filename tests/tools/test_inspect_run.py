"""tools/inspect_run.py as a reader calls it.

Layer: subprocesses with a run folder made by hand. What the page shows: tests/observe/report.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sod.observe.report.payload import unpack
from tests.helpers.tokenizers import tiny_tokenizer
from tests.observe.report import runs

ROOT = Path(__file__).resolve().parents[2]


def _run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/inspect_run.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


@pytest.fixture
def run(tmp_path):
    return runs.small_run(tmp_path / "demo")


def _payloads(page: Path) -> list[tuple]:
    parts = page.read_text().split("data-run-payload>")[1:]
    return [unpack(part.partition("<")[0]) for part in parts]


def test_a_run_becomes_a_page_with_the_runs_own_tokenizer(run):
    tiny_tokenizer().save_pretrained(run / "hf")
    done = _run(run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{run / 'report.html'} (")
    [(meta, _)] = _payloads(run / "report.html")
    assert "print" in "".join(meta["pieces"])


def test_two_runs_and_a_file_of_ones_own(run, tmp_path):
    other, out = runs.small_run(tmp_path / "other"), tmp_path / "both.html"
    done = _run(run, "--compare", other, "--out", out, "--max-text-tokens", 1)
    assert done.returncode == 0, done.stderr
    assert "no tokenizer found" in done.stdout
    payloads = _payloads(out)
    assert [meta["name"] for meta, _ in payloads] == ["demo", "other"]
    assert all("left out" in meta["notes"][0] for meta, _ in payloads)


def test_a_folder_without_a_run_is_one_line(tmp_path):
    done = _run(tmp_path)
    assert done.returncode == 1
    assert "no run here" in done.stderr and "Traceback" not in done.stderr
