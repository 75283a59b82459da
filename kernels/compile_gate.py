"""Compile every CUDA kernel for sm_80, sm_90 and sm_100 and hold ptxas to its report.

Needs nvcc, no GPU. Gate, for kernels on float arithmetic: 0 bytes of stack and spills, at most 64
registers at 512 threads (so that two blocks fit a multiprocessor). float64 kernels, which serve
checking, only may not spill. The vocabulary kernels' inner loop must load 16 bytes at a time.

    python kernels/compile_gate.py [arch ...]      exit code 1 on a regression
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

KERNELS = Path(__file__).resolve().parent
ARCHS = ("80", "90", "100")
MAX_REGISTERS = 64
LOADS_PER_LOOP = 8  # 4 vectors of each of two tensors in flight

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\d+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class KernelReport:
    """What ptxas says of one kernel on one architecture."""

    name: str  # mangled
    arch: str
    registers: int
    stack_bytes: int
    spill_bytes: int

    @property
    def is_double(self) -> bool:
        return bool(re.search(r"kernelId", self.name))

    @property
    def is_vocab(self) -> bool:
        return "vocab_" in self.name

    def problems(self) -> list[str]:
        found = []
        if self.stack_bytes or self.spill_bytes:
            found.append(f"{self.stack_bytes} bytes of stack, {self.spill_bytes} of spills")
        if self.is_vocab and not self.is_double and self.registers > MAX_REGISTERS:
            found.append(f"{self.registers} registers; at most {MAX_REGISTERS}")
        return found


def parse_ptxas(text: str) -> list[KernelReport]:
    """Reports from the output of `nvcc -Xptxas -v`; raises on a kernel without a full report."""
    reports = []
    pieces = re.split(r"(?=Compiling entry function)", text)[1:]
    for piece in pieces:
        entry, stack, registers = (p.search(piece) for p in (_ENTRY, _STACK, _REGISTERS))
        if not (entry and stack and registers):
            raise ValueError(f"ptxas report not understood: {piece[:200]!r}")
        frame, stores, loads = map(int, stack.groups())
        reports.append(KernelReport(entry[1], entry[2], int(registers[1]), frame, stores + loads))
    return reports


def compile_reports(source: Path, arch: str, cubin: Path) -> list[KernelReport]:
    """Compile one .cu file for one architecture; raises with the compiler's words on failure."""
    command = [
        shutil.which("nvcc") or "nvcc",
        *("-std=c++17", "-O3", "-Xptxas", "-v", f"-I{KERNELS / 'include'}"),
        *(f"-arch=sm_{arch}", "-cubin", "-o", str(cubin), str(source)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed on {source.name} for sm_{arch}:\n{done.stderr}")
    return parse_ptxas(done.stdout + done.stderr)


def disassembler() -> str | None:
    """cuobjdump from PATH or from the triton wheel."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


def wide_loads(cubin: Path, tool: str) -> dict[str, int]:
    """Number of 16-byte global loads in each vocabulary kernel's machine code."""
    done = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True)
    counts = {}
    for piece in done.stdout.split("Function : ")[1:]:
        name, _, body = piece.partition("\n")
        counts[name.strip()] = len(re.findall(r"LDG\.E\S*\.128", body))
    return counts


def load_problems(cubin: Path, tool: str) -> list[str]:
    """Aligned float kernels with a teacher must show at least one full loop of 16-byte loads."""
    found = []
    for name, loads in wide_loads(cubin, tool).items():
        # template flags end in Lb1: kAligned; the first flag says whether there is a teacher
        match = re.search(r"vocab_(?:stats|grad)_kernelI\S*?(Lb\d(?:ELb\d)*)E", name)
        if not match or re.search(r"kernelId", name):
            continue
        flags = re.findall(r"Lb(\d)", match[1])
        if flags[0] == "1" and flags[-1] == "1" and loads < LOADS_PER_LOOP:
            found.append(f"{name}: {loads} 16-byte loads; at least {LOADS_PER_LOOP}")
    return found


def main(archs: list[str]) -> int:
    if shutil.which("nvcc") is None:
        print("compile gate: no nvcc on PATH; not run", file=sys.stderr)
        return 2
    tool, problems, worst = disassembler(), [], {}
    with tempfile.TemporaryDirectory() as folder:
        for arch in archs:
            for source in sorted((KERNELS / "src" / "cuda").glob("*.cu")):
                cubin = Path(folder) / f"{source.stem}_{arch}.cubin"
                for report in compile_reports(source, arch, cubin):
                    problems += [f"sm_{arch} {report.name}: {p}" for p in report.problems()]
                    if report.is_vocab and not report.is_double:
                        worst[arch] = max(worst.get(arch, 0), report.registers)
                if tool is not None:
                    problems += [f"sm_{arch} {p}" for p in load_problems(cubin, tool)]
    for arch, registers in worst.items():
        print(f"sm_{arch}: float vocabulary kernels use at most {registers} registers")
    if tool is None:
        print("no cuobjdump (PATH, triton wheel): 16-byte loads not looked at", file=sys.stderr)
    print("\n".join(problems) or "compile gate: passed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(ARCHS)))
