"""The wheel installs without a compiler, and its losses work without vLLM, Megatron and TE.

Layer: a fresh environment (slow).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_PROOF = """
import importlib.util, shutil, sys, torch
import megatron_sod
assert "site-packages" in megatron_sod.__file__, megatron_sod.__file__
for absent in ("vllm", "megatron.core", "transformer_engine", "ray", "transformers"):
    try:
        found = importlib.util.find_spec(absent)
    except ModuleNotFoundError:
        found = None
    assert found is None, absent
assert not any(shutil.which(name) for name in ("cc", "c++", "g++", "gcc", "clang++", "nvcc"))
from megatron_sod.algorithm import step_divergence, step_weights
from megatron_sod.ops import step_weighted_kl
logits = torch.randn(5, 11, requires_grad=True)
ids = torch.tensor([1, 1, 2, 2, 2])
loss, info = step_weighted_kl(
    logits, torch.randn(5, 11), torch.arange(5), ids, torch.zeros(5, dtype=torch.long),
    vocab_start=0, vocab_size=11,
)
loss.sum().backward()
assert torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0
print("proved")
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_works_in_a_fresh_environment_without_a_compiler(tmp_path):
    def run(*command, **options):
        run = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, timeout=600, **options
        )
        assert run.returncode == 0, f"{command}\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}"
        return run.stdout

    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", ".", ROOT)
    (wheel,) = tmp_path.glob("megatron_sod-*.whl")
    run(sys.executable, "-m", "venv", "fresh")
    python = str(tmp_path / "fresh" / "bin" / "python")
    # No compiler, and nothing of this checkout, can be found from here on.
    bare = {"PATH": str(tmp_path / "fresh" / "bin"), "HOME": str(tmp_path)}
    bare |= {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.endswith("_proxy")}
    run(python, "-m", "pip", "install", "--quiet", "torch==2.13.0", env=bare)
    run(python, "-m", "pip", "install", "--quiet", wheel, "pytest", "pytest-timeout", env=bare)
    assert "proved" in run(python, "-c", _PROOF, env=bare)
    tests = tmp_path / "tests"
    tests.mkdir()
    for part in ("__init__.py", "conftest.py", "algorithm", "helpers"):
        (tests / part).symlink_to(ROOT / "tests" / part)
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-o", "pythonpath=."]
    out = run(python, "-m", "pytest", *options, "tests/algorithm", env=bare)
    assert " passed" in out and "failed" not in out
