"""Concurrency, files, limits and lifetimes of the embedded sandbox."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_sod.errors import SandboxError
from megatron_sod.sandbox import Limits, open_sandbox
from megatron_sod.sandbox.guest import processes

SPAN = "import time\na=time.monotonic()\ntime.sleep(.1)\nprint(a, time.monotonic())"


def test_runs_at_the_same_time_stay_within_the_bound():
    with open_sandbox(max_concurrency=3, timeout_s=20) as sandbox:
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            results = list(pool.map(lambda _: sandbox.run(SPAN), range(24)))
    spans = [tuple(map(float, r.stdout.split())) for r in results]
    most = max(sum(a <= start < b for a, b in spans) for start, _ in spans)
    assert 2 <= most <= 3


def test_results_go_to_their_own_caller(sandbox):
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        results = list(pool.map(lambda i: sandbox.run(f"print({i})"), range(60)))
    assert [r.stdout for r in results] == [f"{i}\n" for i in range(60)]


def test_files_go_in_and_come_out(sandbox):
    program = "s = open('in/a.bin','rb').read()\nopen('out.bin','wb').write(s[::-1])"
    files = {"in/a.bin": bytes(range(256)), "b": b""}
    result = sandbox.run(program, files=files, fetch=["out.bin", "missing", "in/a.bin"], echo=False)
    assert result.files == {"out.bin": bytes(range(256))[::-1], "in/a.bin": bytes(range(256))}


def test_only_regular_files_are_fetched_and_no_link_is_followed(sandbox):
    program = (
        "import os\nos.symlink('/etc/passwd','l')\nos.mkfifo('p')\nos.mkdir('d')\n"
        "os.symlink('/etc','e')\nopen('d/f','w').write('ok')"
    )
    result = sandbox.run(program, fetch=["l", "p", "d", "e/passwd", "d/f", "d/f/x"])
    assert result.files == {"d/f": b"ok"}


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/etc/x", "a/../b", "a//b", "x" * 300, "a\0", "\ud800"]
)
def test_file_names_stay_below_the_scratch(name, sandbox):
    with pytest.raises(ValueError, match="file name"):
        sandbox.run("1", files={name: b""})
    with pytest.raises(ValueError, match="file name"):
        sandbox.run("1", fetch=[name])


def test_a_file_cannot_be_a_directory_too(sandbox):
    with pytest.raises(ValueError, match="also the directory"):
        sandbox.run("1", files={"a": b"", "a/b": b""})


@pytest.mark.parametrize("code", [None, 5, ["print(1)"], {"code": "1"}, b"print(1)"])
def test_code_must_be_text(code, sandbox):
    with pytest.raises(TypeError, match="code must be str"):
        sandbox.run(code)


def test_cancel_stops_a_run_at_once(sandbox):
    cancel = threading.Event()
    threading.Timer(0.3, cancel.set).start()
    result = sandbox.run("import time; time.sleep(30)", cancel=cancel)
    assert result.outcome == "infra_error" and result.detail == "cancelled"
    assert result.duration_s < 5


@pytest.mark.parametrize(
    "values",
    [
        {"timeout_s": 0},
        {"timeout_s": -1},
        {"timeout_s": float("nan")},
        {"timeout_s": 1e9},
        {"timeout_s": "5"},
        {"memory_mb": 1},
        {"memory_mb": 10**9},
        {"memory_mb": 1.5},
        {"num_processes": 0},
    ],
)
def test_impossible_limits_are_refused_with_their_name(values):
    with pytest.raises(SandboxError, match=next(iter(values))):
        Limits(**values)


def test_interpreter_that_cannot_start_is_no_fault_of_the_program():
    with open_sandbox(warm=False) as sandbox:
        result = sandbox.run("print(1)", limits=Limits(memory_mb=32, num_files=3))
    assert result.outcome == "infra_error" and "memory limit 32 MB" in result.detail
    assert (result.stdout, result.stderr, result.return_code) == ("", "", None)


def test_close_ends_a_run_and_leaves_no_process():
    before = set(processes.descendants(os.getpid()))
    sandbox = open_sandbox()
    results = []
    thread = threading.Thread(
        target=lambda: results.append(sandbox.run("import time; time.sleep(60)"))
    )
    thread.start()
    time.sleep(0.5)
    sandbox.close()
    sandbox.close()
    thread.join(10)
    assert results[0].outcome == "infra_error"
    assert sandbox.run("1").outcome == "infra_error"
    assert set(processes.descendants(os.getpid())) <= before


def test_opened_in_a_thread_that_ended_it_goes_on():
    opened = []
    thread = threading.Thread(target=lambda: opened.append(open_sandbox()))
    thread.start()
    thread.join()
    with opened[0] as sandbox:
        time.sleep(0.2)
        assert sandbox.run("print(1)").stdout == "1\n"


def test_dead_guest_process_is_replaced():
    with open_sandbox() as sandbox:
        first = sandbox._zygote.pid
        os.kill(first, signal.SIGKILL)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda i: sandbox.run(f"print({i})"), range(8)))
        assert [r.stdout for r in results] == [f"{i}\n" for i in range(8)]
        assert sandbox._zygote.pid != first


OWNER = """
import os, sys, threading, time
from megatron_sod.sandbox import open_sandbox
from tests.sandbox.harness import open_the_way
if os.getuid() == 0 and {level!r} != "L3":
    open_the_way([sys.base_prefix, sys.prefix, os.getcwd()])
from megatron_sod.sandbox.guest.processes import descendants
sandbox = open_sandbox({level!r}, timeout_s=100)
program = "import subprocess, sys, time\\nsubprocess.Popen([sys.executable, '-c', "
program += "'import time; time.sleep(77)'], start_new_session=True)\\ntime.sleep(77)"
threading.Thread(target=sandbox.run, args=(program,), daemon=True).start()
deadline = time.monotonic() + 30
while len(descendants(os.getpid())) < 4 and time.monotonic() < deadline:
    time.sleep(0.05)
print(*descendants(os.getpid()), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("level", ["L3", "L2"])
@pytest.mark.parametrize("is_guest_killed", [False, True])
def test_everything_dies_with_its_owner_or_with_the_guest_process(level, is_guest_killed):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(level=level)], stdout=subprocess.PIPE, text=True
    )
    pids = [int(p) for p in owner.stdout.readline().split()]
    if not pids:
        owner.wait()
        pytest.skip(f"{level} is not reached here")
    os.kill(pids[0] if is_guest_killed else owner.pid, signal.SIGKILL)
    watched = [p for p in pids if p != owner.pid]
    deadline = time.monotonic() + 10
    while any(map(is_running, watched)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = list(filter(is_running, watched))
    owner.kill()
    owner.communicate()
    assert left == []


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


def test_sandbox_needs_neither_torch_nor_ray_nor_vllm():
    program = (
        "import sys\n"
        "for name in ('torch', 'ray', 'vllm', 'numpy', 'aiohttp'): sys.modules[name] = None\n"
        "from megatron_sod.sandbox import open_sandbox\n"
        "from megatron_sod.sandbox.fusion_client import FusionClient\n"
        "with open_sandbox() as sandbox: print(sandbox.run('1 + 1').stdout)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "2", run.stderr
