"""How a level is chosen: by trying it, from the strongest down, and never silently weaker."""

import os
import shutil
import subprocess
import sys

import pytest

from megatron_sod.errors import SandboxError
from megatron_sod.sandbox import ladder, open_sandbox, seccomp, selfcheck
from megatron_sod.sandbox.local import LocalSandbox

OPEN = "from megatron_sod.sandbox import open_sandbox\nwith open_sandbox() as s: print(s.level)"
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give up capabilities")


def test_auto_takes_the_first_level_that_works(monkeypatch):
    tried = []

    def fail_above_l1(sandbox):
        tried.append(sandbox.level)
        return None if sandbox.level == "L1" else "pretended"

    monkeypatch.setattr(ladder, "_try_canary", fail_above_l1)
    try:
        opened = open_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))
    with opened as sandbox:
        assert sandbox.level == "L1" and tried[-1] == "L1"
        assert set(sandbox.describe()["passed_over"]) == {"L3", "L2"}


def test_no_level_is_an_error_with_every_reason(monkeypatch):
    monkeypatch.setattr(ladder, "_try_canary", lambda sandbox: f"{sandbox.level} leaks")
    with pytest.raises(SandboxError, match="L3: .*; L2: .*; L1: "):
        open_sandbox()


def test_unsafe_level_needs_the_explicit_word(monkeypatch):
    with pytest.raises(SandboxError, match="allow_unsafe=True"):
        open_sandbox("L0")
    monkeypatch.setattr(ladder, "_try_canary", lambda sandbox: "pretended")
    with open_sandbox(allow_unsafe=True) as sandbox:
        assert sandbox.level == "L0"
        assert sandbox.run("print(1)").stdout == "1\n"
        assert sandbox.run("import time; time.sleep(9)", limits=brief(sandbox)).outcome == "timeout"


def brief(sandbox):
    return type(sandbox.limits)(timeout_s=0.5)


@pytest.mark.parametrize("level", ["L4", "l3", "", None])
def test_unknown_level_is_refused(level):
    with pytest.raises(SandboxError, match="must be 'auto' or one of"):
        open_sandbox(level)


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_impossible_concurrency_is_refused(count):
    with pytest.raises(SandboxError, match="max_concurrency"):
        open_sandbox(max_concurrency=count)


def test_missing_interpreter_and_missing_preload_are_named():
    with pytest.raises(SandboxError, match="/nowhere/python"):
        open_sandbox(python="/nowhere/python")
    with pytest.raises(SandboxError, match="no_such_module"):
        open_sandbox(preload=("no_such_module",))


def test_preloaded_module_is_there_already():
    program = "import sys; print('decimal' in sys.modules)"
    for warm, expected in ((True, "True\n"), (False, "False\n")):
        with open_sandbox(warm=warm, preload=("decimal",)) as sandbox:
            assert sandbox.run(program).stdout == expected


@needs_root
def test_container_gets_landlock():
    command = [sys.executable, "-m", "tests.sandbox.container", sys.executable, "-c", OPEN]
    run = subprocess.run(command, capture_output=True, text=True)
    if "Landlock ABI 0" in run.stderr:
        pytest.skip("this kernel has no Landlock")
    assert run.stdout.strip() == "L2", run.stderr


@needs_root
def test_root_that_no_process_limit_holds_is_refused():
    """`unshare -r` by root: user 0 of a namespace is still the machine's root, whose RLIMIT_NPROC
    the kernel ignores, so a fork bomb would take the machine."""
    if shutil.which("unshare") is None:
        pytest.skip("util-linux's unshare is not installed")
    command = ["unshare", "-r", sys.executable, "-c", OPEN]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode and "no permitted isolation level" not in run.stderr:
        pytest.skip(run.stderr.strip()[-200:])
    assert "fork() was allowed" in run.stderr and run.stdout == ""


def test_selfcheck_passes_on_the_chosen_level(sandbox):
    rows = selfcheck(sandbox)
    assert len(rows) >= 15 and len({name for name, _, _ in rows}) == len(rows)
    assert [row for row in rows if not row[1]] == []


def test_selfcheck_fails_where_nothing_protects(monkeypatch):
    """At L0 under another level's name the refusals do not hold (the bombs are left out)."""
    module = sys.modules["megatron_sod.sandbox.selfcheck"]
    monkeypatch.setattr(module, "_behaviours", lambda limits: [])
    with open_sandbox("L0", allow_unsafe=True) as sandbox:
        sandbox.level = "L3"
        rows = {name: (passed, detail) for name, passed, detail in selfcheck(sandbox)}
    assert not rows["network"][0] and not rows["host files, reading"][0]
    assert "reached" in rows["network"][1]


class TestFilter:
    """The system-call filter, assembled by libseccomp and by the built-in assembler."""

    PROGRAM = (
        "import ctypes, os, socket\nl = ctypes.CDLL(None, use_errno=True)\n"
        "def t(*a): print(l.syscall(*a), ctypes.get_errno())\n"
        "try: socket.socket()\nexcept OSError as e: print(e.errno)\n"
        "socket.socketpair()\n"
        "t({bpf},0,0,0); t({clone},0x10000011,0,0,0,0); t({memfd},b'x',0)\n"
        "t({ioctl},0,ctypes.c_long((1<<32)|0x5412),b'x'); t({prlimit},os.getppid(),7,None,None)\n"
        "if os.fork() == 0: os._exit(7)\nprint(os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )

    @pytest.mark.parametrize("use_library", [True, False])
    def test_both_assemblers_refuse_the_same(self, use_library, monkeypatch):
        import platform

        numbers = seccomp.NUMBERS.get(platform.machine())
        if numbers is None:
            pytest.skip("the built-in assembler does not know this architecture")
        if use_library:
            pytest.importorskip("pyseccomp")
        else:
            monkeypatch.setattr(seccomp, "_assemble_with_library", missing_library)
        program = self.PROGRAM.format(
            bpf=numbers["bpf"],
            clone=numbers["clone"],
            memfd=numbers["memfd_create"],
            ioctl=numbers["ioctl"],
            prlimit=numbers["prlimit64"],
        )
        with open_sandbox() as sandbox:
            name = "libseccomp" if use_library else "built-in"
            assert f"filter by {name}" in sandbox.describe()["mechanisms"]
            result = sandbox.run(program)
        assert result.stdout == "13\n-1 1\n-1 1\n-1 38\n-1 1\n-1 1\n7\n", result.stderr

    def test_unknown_architecture_needs_the_library(self):
        with pytest.raises(OSError, match="install libseccomp"):
            seccomp.assemble([], machine="riscv64")

    @pytest.mark.parametrize("use_library", [True, False])
    def test_signals_can_be_held_to_oneself(self, use_library):
        """For a user whose other processes nothing else protects (Landlock before ABI 6)."""
        if use_library:
            pytest.importorskip("pyseccomp")
        program, _ = seccomp.build_filter(True, True, use_library)
        with open_sandbox() as opened:
            level, config = opened.level, dict(opened._config)
        config["seccomp"] = program.hex()
        tried = (
            "import os\ndef t(*a):\n  try: os.kill(*a); print('sent')\n"
            "  except OSError as e: print(e.errno)\n"
            "t(os.getpid(), 0); t(os.getppid(), 0); t(-1, 0); t(0, 0)\n"
            "try: os.chmod('.', 0o755)\nexcept OSError as e: print(e.errno)"
        )
        with LocalSandbox(config, opened.limits, 2, True, {"level": level}) as sandbox:
            result = sandbox.run(tried)
        assert result.stdout == "sent\n1\n1\n1\n1\n", result.stderr


def missing_library(_rules):
    raise ImportError("pretended: no libseccomp")
