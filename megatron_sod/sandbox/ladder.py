"""Chooses the isolation level: from the strongest down, each by really opening it and running a
program that tries to get out. Nothing weaker than asked for is ever used silently."""

import os
import sys

from megatron_sod.errors import SandboxError

from . import guest, interpreter, seccomp
from .guest import linux
from .limits import Limits
from .local import LocalSandbox
from .zygote import usable_uids

LEVELS = ("L3", "L2", "L1", "L0")
_MECHANISMS = {
    "L3": "user, mount, pid, network, IPC, UTS and cgroup namespaces, read-only root, seccomp",
    "L2": "Landlock, seccomp",
    "L1": "seccomp",
    "L0": "resource limits only",
}
# Each line must hold at every level above L0; the program ends with exit code 3 at the first
# that does not.
_CANARY = """
import os, sys
try:
    import colorsys, resource, socket, subprocess  # the libraries can be read
    subprocess.run([sys.executable, "-S", "-c", ""], check=True)
except (ImportError, OSError):
    sys.exit(4)
def refused(call, *arguments):
    try:
        call(*arguments)
    except OSError:
        return
    print(f"{call.__name__}{arguments} was allowed", file=sys.stderr, flush=True)
    os._exit(3)
def fork():  # a uid that the kernel takes for the real root is bounded by no process limit
    if os.fork() == 0:
        os._exit(0)
refused(socket.socket)
if os.getppid() != 1:  # else the parent is the init of a namespace of its own
    refused(os.kill, os.getppid(), 0)
refused(open, "/etc/shadow")
refused(os.setuid, 0)
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
refused(fork)
open("f", "w").write("x")
print(open("f").read())
"""
_UNREADABLE = 4


def open_sandbox(
    level="auto",
    timeout_s=10,
    memory_mb=2048,
    warm=True,
    preload=("math",),
    echo=True,
    max_concurrency=None,
    allow_unsafe=False,
    python=None,
    limits=None,
):
    """The strongest sandbox this machine allows, or the demanded level, or an error.

    Args:
        level: "auto" (L3, then L2, then L1) or one of LEVELS; L0 needs allow_unsafe.
        timeout_s: wall seconds of one run. memory_mb: MB of one run.
        warm: fork each run from a process that has imported `preload`; else start an interpreter.
        echo: print the value of a last expression.
        max_concurrency: runs at the same time; more wait. Default: twice the CPUs.
        allow_unsafe: permit L0. python: absolute path of the guest's interpreter, if another.
        limits: a Limits for everything else; its timeout_s and memory_mb are replaced.
    Returns:
        LocalSandbox, a context manager.
    Raises:
        SandboxError: no permitted level works here; has the reason of each.
    """
    if level != "auto" and level not in LEVELS:
        raise SandboxError(f"level is {level!r}; it must be 'auto' or one of {', '.join(LEVELS)}")
    if level == "L0" and not allow_unsafe:
        raise SandboxError("level L0 protects nothing from the program; it needs allow_unsafe=True")
    limits = Limits(**{**vars(limits or Limits()), "timeout_s": timeout_s, "memory_mb": memory_mb})
    tried = LEVELS if allow_unsafe else LEVELS[:-1]
    reasons: dict[str, str] = {}
    for name in tried if level == "auto" else (level,):
        try:
            config = _config(name, python or sys.executable, warm, preload)
            note = {"level": name, "mechanisms": config.pop("mechanisms"), "warm": warm}
            note |= {"limits": vars(limits), "passed_over": dict(reasons)}
            sandbox = LocalSandbox(config, limits, max_concurrency, echo, note)
        except SandboxError as error:
            reasons[name] = str(error)
            continue
        problem = _try_canary(sandbox) if name != "L0" else None
        if problem is None:
            return sandbox
        sandbox.close()
        reasons[name] = problem
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise SandboxError(f"no permitted isolation level works here ({listed})")


def _config(level, python, warm, preload):
    """What the guest process is told. Raises SandboxError where the level cannot be."""
    is_root = os.getuid() == 0 and len(usable_uids()) > 0
    abi = linux.landlock_abi()
    contains_signals = is_root or level == "L3" or abi >= 6
    if level == "L2" and (abi < 1 or not contains_signals):
        raise SandboxError(
            f"Landlock ABI {abi}: 1 is needed as root, 6 (Linux 6.12) as another user"
        )
    if level == "L1" and not is_root and abi < 1:
        raise SandboxError("without Landlock it needs root, to give the program another user")
    binds, links = interpreter.readable_paths(python)
    config = {
        "level": level,
        "drops_uid": is_root and level != "L0",
        "landlock": level == "L2" or (level == "L1" and not is_root),
        "kept_capability": None,
        "binds": binds,
        "links": links,
        "python": interpreter.interpreter_command(python),
        "warm": warm,
        "preload": list(preload) if warm else [],
        "seccomp": "",
        "cold_source": _runner_text(),
        "mechanisms": _MECHANISMS[level],
    }
    if level != "L0":
        keeps_uid = not is_root and level != "L3"
        if is_root and level == "L2" and interpreter.is_closed(binds.values()):
            config["kept_capability"] = _key_to_closed_folders(abi)
        has_key = config["kept_capability"] is not None
        try:
            program, assembler = seccomp.build_filter(keeps_uid or has_key, keeps_uid and abi < 6)
        except OSError as error:
            raise SandboxError(str(error)) from None
        config["seccomp"] = program.hex()
        config["own_pid_marker"] = seccomp.own_pid_marker().hex()
        config["mechanisms"] += f", filter by {assembler}"
        config["mechanisms"] += ", a user of its own" if config["drops_uid"] else ""
    return config


def _key_to_closed_folders(abi):
    """The capability that lets a guest pass directories like /root to reach the interpreter.

    Landlock's list still decides what it can open there. CAP_DAC_OVERRIDE (what containers have)
    also allows writing, so truncate(2) must be covered too: ABI 3. None where neither will do.
    """
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("CapEff"))
    held = int(line.split()[1], 16)
    for capability, oldest_abi in ((linux.CAP_DAC_READ_SEARCH, 1), (linux.CAP_DAC_OVERRIDE, 3)):
        if held >> capability & 1 and abi >= oldest_abi:
            return capability
    return None


def _runner_text():
    path = os.path.join(os.path.dirname(guest.__file__), "runner.py")
    with open(path, encoding="utf-8") as file:
        return file.read() + "\n\ncold_main()\n"


def _try_canary(sandbox):
    """None when the trial program was contained, else what went wrong."""
    result = sandbox.run(_CANARY)
    if result.outcome == "ok" and result.stdout == "x\n":
        return None
    if result.return_code == _UNREADABLE:
        return (
            "the guest's user cannot read or start the interpreter; install Python outside a "
            "private directory such as /root, or name another one with python="
        )
    text = result.detail or result.stderr.strip()[-300:]
    return f"the trial program ended with {result.outcome}, exit code {result.return_code} ({text})"
