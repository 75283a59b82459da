"""The gate on ptxas' report: it reads the report right, fails on a regression, and passes today.

The full gate compiles every kernel for three architectures: about five seconds each.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


@pytest.fixture(scope="module")
def gate():
    spec = importlib.util.spec_from_file_location("compile_gate", KERNELS / "compile_gate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["compile_gate"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["compile_gate"]


REPORT = """ptxas info    : Compiling entry function '{name}' for 'sm_90'
ptxas info    : Function properties for {name}
    {stack} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, 512 bytes smem
"""
FLOAT, DOUBLE = (
    "_ZN3sod18vocab_stats_kernelIfLb1ELb1EEEv",
    "_ZN3sod18vocab_stats_kernelIdLb1ELb1EEEv",
)


def problems(gate, **report):
    fields = dict(name=FLOAT, stack=0, spill=0, registers=64) | report
    return [p for r in gate.parse_ptxas(REPORT.format(**fields)) for p in r.problems()]


def test_a_good_report_passes_and_each_regression_is_named(gate):
    assert problems(gate) == []
    assert "72 registers" in problems(gate, registers=72)[0]
    assert "8 bytes of stack" in problems(gate, stack=8)[0]
    assert "32 of spills" in problems(gate, spill=16)[0]
    assert problems(gate, name=DOUBLE, registers=128) == []
    assert problems(gate, name=DOUBLE, spill=4) != []


def test_a_report_it_cannot_read_is_an_error(gate):
    with pytest.raises(ValueError, match="not understood"):
        gate.parse_ptxas(REPORT.format(name=FLOAT, stack=0, spill=0, registers=64)[:200])


@needs_nvcc
def test_a_spilling_kernel_is_caught(gate, tmp_path):
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) vocab_spill_kernel(float* x) {\n"
        "  float v[96];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) v[i] = x[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) x[i * 1024 + threadIdx.x] = v[95 - i] * v[(i * 7) % 96];\n"
        "}\n"
    )
    (report,) = gate.compile_reports(source, "90", tmp_path / "spills.cubin")
    assert report.spill_bytes > 0 and report.problems()


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_every_kernel_passes_the_gate(gate, arch, capsys):
    assert gate.main([arch]) == 0, capsys.readouterr().out
