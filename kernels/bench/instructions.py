"""Instructions per (token x column) of the scoring pass, counted by callgrind.

python kernels/bench/instructions.py            needs a C++ compiler and valgrind
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

KERNELS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(KERNELS))

from native_build import CXX_FLAGS, INCLUDE, SOURCES, compiler, cpu_objects  # noqa: E402

LIMIT_AVX2 = 8.0


def build_driver(folder: Path) -> Path:
    """The torch-free driver, from the same sources and flags as the library."""
    cxx, objects = compiler(), []
    jobs = [(SOURCES / "cpu" / f"{name}.cpp", flags) for name, flags in cpu_objects()]
    jobs.append((KERNELS / "bench" / "callgrind_driver.cpp", []))
    for source, flags in jobs:
        out = folder / f"{source.stem}.o"
        command = [cxx, *CXX_FLAGS, *flags, f"-I{INCLUDE}", "-c", str(source), "-o", str(out)]
        subprocess.run(command, check=True)
        objects.append(str(out))
    driver = folder / "driver"
    subprocess.run([cxx, *objects, "-o", str(driver)], check=True)
    return driver


def instructions_per_pair(isa: str, rows: int = 2, cols: int = 151_936) -> float:
    """Instructions of the scoring pass divided by rows x cols. Valgrind knows no AVX-512."""
    with tempfile.TemporaryDirectory() as name:
        driver = build_driver(Path(name))
        command = [
            "valgrind",
            "--tool=callgrind",
            "--toggle-collect=counted_scoring_pass",
            f"--callgrind-out-file={name}/out",
            *(str(driver), str(rows), str(cols)),
        ]
        environment = {**os.environ, "SOD_CPU_ISA": isa}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        found = re.search(r"Collected : (\d+)", done.stderr)
        if done.returncode != 0 or found is None:
            raise RuntimeError(f"callgrind failed: {done.stderr[-2000:]}")
        return int(found[1]) / (rows * cols)


def main() -> int:
    if shutil.which("valgrind") is None:
        print("no valgrind on PATH; not run", file=sys.stderr)
        return 2
    for isa in ("avx2", "scalar"):
        count = instructions_per_pair(isa)
        print(f"{isa}: {count:.2f} instructions per pair")
        if isa == "avx2" and count > LIMIT_AVX2:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
