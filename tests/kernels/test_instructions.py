"""Instructions per (token x column) of the AVX2 scoring pass, exactly counted under callgrind."""

import importlib.util
import shutil
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "kernels" / "bench" / "instructions.py"


@pytest.mark.skipif(
    shutil.which("valgrind") is None or shutil.which("c++") is None,
    reason="needs valgrind and a C++ compiler",
)
def test_the_avx2_scoring_pass_stays_within_eight_instructions():
    spec = importlib.util.spec_from_file_location("sod_instructions", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.instructions_per_pair("avx2", rows=1, cols=50_000) <= module.LIMIT_AVX2
