"""Builds the compiled libraries next to `megatron_sod/ops`; setup.py hands this to setuptools.

CPU library: wherever a C++ compiler and torch's headers exist. CUDA library: where also nvcc and a
CUDA build of torch exist. Anything missing costs one line of warning, never the installation.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

KERNELS = Path(__file__).resolve().parent
INCLUDE = KERNELS / "include"
SOURCES = KERNELS / "src"

TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fvisibility=hidden"]
X86_FLAGS = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c".split(),
    "avx2": "-mavx2 -mfma -mf16c".split(),
}
CUDA_ARCHS = ("80", "90", "100")
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xptxas", "-v"]


def extensions() -> list[Extension]:
    """Both libraries; `BuildNative` skips, with one line, what this machine cannot build."""
    return [
        Extension("megatron_sod.ops._sod_cpu", sources=[], py_limited_api=True),
        Extension("megatron_sod.ops._sod_cuda", sources=[], py_limited_api=True),
    ]


class BuildNative(build_ext):
    """Calls the compilers directly: three instruction sets need three sets of flags."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        build = build_cuda if ext.name.endswith("_cuda") else build_cpu
        try:
            build(target)
        except BuildSkipped as why:
            print(f"warning: {ext.name} is not built: {why}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """For --inplace and editable installs; only what was built exists to be copied."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(self.get_ext_fullname(ext.name))
            if built.exists():
                shutil.copy2(built, KERNELS.parent / "megatron_sod" / "ops" / built.name)

    def get_outputs(self) -> list[str]:
        return [name for name in super().get_outputs() if Path(name).exists()]


class BuildSkipped(Exception):
    """This machine lacks something the library needs; the message names it."""


def compiler() -> str:
    """The C++ compiler: $CXX, else the first of the usual names."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise BuildSkipped("no C++ compiler found; install one (or set CXX) and build again")


def torch_paths() -> tuple[Path, Path]:
    """torch's include and lib folders."""
    try:
        import torch
    except ImportError as error:
        raise BuildSkipped(
            "torch cannot be imported while building; install torch first, then use "
            "`pip install --no-build-isolation`"
        ) from error
    root = Path(torch.__file__).parent
    return root / "include", root / "lib"


def cpu_objects() -> list[tuple[str, list[str]]]:
    """Torch-free sources and the extra flags of each."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sources = [("isa_scalar", []), ("dispatch", ["-DSOD_HAVE_X86"] if x86 else [])]
    if x86:
        sources += [(f"isa_{name}", flags) for name, flags in X86_FLAGS.items()]
    return sources


def build_cpu(target: Path) -> Path:
    """Compile and link the CPU library to `target`."""
    cxx = compiler()
    include, lib = torch_paths()
    jobs = [(SOURCES / "cpu" / f"{name}.cpp", flags) for name, flags in cpu_objects()]
    jobs.append((SOURCES / "cpu_bindings.cpp", [TORCH_TARGET, "-isystem", str(include)]))
    with tempfile.TemporaryDirectory() as folder:
        commands = []
        for source, flags in jobs:
            out = Path(folder) / f"{source.stem}.o"
            commands.append([cxx, *CXX_FLAGS, *flags, f"-I{INCLUDE}", "-c", source, "-o", out])
        _run_all(commands)
        objects = [command[-1] for command in commands]
        _link(cxx, objects, target, lib, ["-ltorch_cpu"])
    return target


def build_cuda(target: Path) -> Path:
    """Compile and link the CUDA library to `target`."""
    cxx, nvcc = compiler(), shutil.which("nvcc")
    include, lib = torch_paths()
    import torch

    if nvcc is None:
        raise BuildSkipped("no nvcc on PATH; the CUDA kernels need the CUDA toolkit")
    if torch.version.cuda is None:
        raise BuildSkipped("the installed torch has no CUDA; PyTorch serves on GPUs it cannot see")
    cuda_root = Path(nvcc).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        commands = [
            cuda_command(nvcc, source, Path(folder) / f"{source.stem}.o")
            for source in sorted((SOURCES / "cuda").glob("*.cu"))
        ]
        bindings = Path(folder) / "cuda_bindings.o"
        flags = [*CXX_FLAGS, TORCH_TARGET, "-DUSE_CUDA", "-isystem", str(include)]
        flags += [f"-I{INCLUDE}", "-isystem", str(cuda_root / "include")]
        commands.append([cxx, *flags, "-c", SOURCES / "cuda_bindings.cpp", "-o", bindings])
        _run_all(commands)
        objects = [command[-1] for command in commands]
        cuda_lib = [f"-L{cuda_root / 'lib64'}", "-lcudart", "-ltorch_cuda", "-ltorch_cpu"]
        _link(cxx, objects, target, lib, cuda_lib)
    return target


def cuda_command(nvcc: str, source: Path, out: Path, archs: tuple[str, ...] = CUDA_ARCHS) -> list:
    """One .cu file for every architecture, with PTX of the newest for the ones to come."""
    targets = []
    for arch in archs:
        targets += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    targets += ["-gencode", f"arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
    flags = [*NVCC_FLAGS, "-Xcompiler", "-fPIC", f"-I{INCLUDE}"]
    return [nvcc, *flags, *targets, "-c", str(source), "-o", str(out)]


def _run_all(commands: list[list]) -> None:
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        list(pool.map(_run, commands))


def _run(command: list) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stdout + done.stderr, file=sys.stderr)
        raise RuntimeError(f"compiler failed on {command[-3]}; its report is above")


def _link(cxx: str, objects: list, target: Path, lib: Path, libraries: list[str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # the loader finds torch's libraries by name: the process has them open before ours
    _run([cxx, "-shared", *objects, f"-L{lib}", *libraries, "-o", target])
