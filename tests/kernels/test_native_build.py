"""A machine without a compiler still installs: one line says what is missing, nothing fails."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_without_a_compiler_the_build_warns_and_goes_on(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": str(tmp_path), "CXX": ""},
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("warning: megatron_sod")]
    assert len(lines) == 2 and all("no C++ compiler" in line for line in lines)
    assert not list(tmp_path.rglob("*.so"))


def test_the_fallback_serves_and_says_so_in_one_line():
    code = """
import logging
import torch
def gone(path):
    raise OSError("no such library")
torch.ops.load_library = gone
logging.basicConfig(level="WARNING")
from megatron_sod.ops import dispatch, vocab_parallel_divergence
print(sorted(dispatch.COMPILED_DEVICES))
logits = torch.zeros(1, 4)
stats = vocab_parallel_divergence(logits, logits, torch.tensor([0]), vocab_start=0, vocab_size=4)
print(stats.student_entropy.item())
"""
    done = run(code, SOD_OPS_IMPL="")
    assert done.returncode == 0, done.stderr
    served, entropy = done.stdout.split()
    assert served == "[]" and float(entropy) == pytest.approx(math.log(4))
    assert done.stderr.count("the op runs in PyTorch") == 1


def test_forcing_an_implementation():
    code = "from megatron_sod.ops import dispatch; print(sorted(dispatch.COMPILED_DEVICES))"
    assert run(code, SOD_OPS_IMPL="reference").stdout.strip() == "[]"
    refused = run(code, SOD_OPS_IMPL="fastest")
    assert refused.returncode != 0 and "must be reference or compiled" in refused.stderr
