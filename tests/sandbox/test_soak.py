"""Thousands of runs leave nothing behind, and random bytes never hurt the caller.

200 runs by default; 5,000 of each are marked slow.
"""

import concurrent.futures
import os
import random
import time

import pytest

from megatron_sod.sandbox import OUTCOMES, Limits, open_sandbox
from megatron_sod.sandbox.guest.processes import descendants

PROGRAMS = [
    "print(1)",
    "1/0",
    "open('f','w').write('x' * 100000)",
    "import os\nif os.fork() == 0:\n  os.setsid()\n  import time; time.sleep(30)",
    "print('y' * 200000)",
    "import os; os.abort()",
    "import threading; threading.Thread(target=print, args=(2,)).start()",
    "x = bytearray(1 << 40)",
    "(",
]


def resident_bytes(pid):
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def state(sandbox):
    """What must not grow: descriptors, threads, processes, scratch, memory of both processes."""
    guest = sandbox._zygote.pid
    folder = sandbox._zygote._folder
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "guest_descriptors": len(os.listdir(f"/proc/{guest}/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "processes": len(descendants(guest)),
        "scratch": len(os.listdir(folder)) if folder else 0,
        "memory": resident_bytes("self"),
        "guest_memory": resident_bytes(guest),
    }


def soak(level, num_runs):
    limits = Limits(timeout_s=20, memory_mb=256)
    with open_sandbox(level, limits=limits, timeout_s=20, memory_mb=256) as sandbox:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(sandbox.run, PROGRAMS * 4))
            time.sleep(0.2)
            before = state(sandbox)
            programs = (PROGRAMS * num_runs)[:num_runs]
            outcomes = set()
            for start in range(0, num_runs, 100):  # the pool itself holds memory per waiting run
                batch = programs[start : start + 100]
                outcomes.update(pool.map(lambda code: sandbox.run(code).outcome, batch))
            deadline = time.monotonic() + 5  # the last supervisors are collected within 20 ms
            while state(sandbox)["processes"] and time.monotonic() < deadline:
                time.sleep(0.02)
            after = state(sandbox)
    assert outcomes == {"ok", "user_error", "memory"}
    for name in ("descriptors", "guest_descriptors", "threads", "processes", "scratch"):
        assert after[name] <= before[name], (name, before, after)
    for name in ("memory", "guest_memory"):
        assert after[name] - before[name] < 8 << 20, (name, before, after)


def fuzz(num_runs, seed):
    """Random bytes, as text and as mutations of the programs, for code and for stdin."""
    chance = random.Random(seed)
    alphabet = "\n\t :()[]{}'\"\\#=+*%0123456789abcdefimnoprstx\u00e9\u20ac\U0001f469\x00\x1b\x7f"

    def code(_):
        kind = chance.randrange(3)
        if kind == 0:
            return "".join(chance.choice(alphabet) for _ in range(chance.randrange(200)))
        if kind == 1:
            return chance.randbytes(chance.randrange(300)).decode("latin-1")
        text = list(chance.choice(PROGRAMS))
        for _ in range(chance.randrange(1, 4)):
            text[chance.randrange(len(text))] = chance.choice(alphabet)
        return "".join(text)

    cases = [(code(i), chance.randbytes(chance.randrange(100))) for i in range(num_runs)]
    limits = Limits(timeout_s=2, memory_mb=256)
    with open_sandbox(limits=limits, timeout_s=2, memory_mb=256) as sandbox:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda case: sandbox.run(*case), cases))
        time.sleep(0.2)
        left = state(sandbox)["processes"]
        assert sandbox.run("print('alive')").stdout == "alive\n"
    assert {r.outcome for r in results} <= set(OUTCOMES) - {"infra_error"}
    assert left == 0
    for result in results:
        result.observation_text().encode("utf-8")
        assert result.duration_s < 6


def test_two_hundred_runs_leave_nothing():
    soak("auto", 200)


def test_two_hundred_random_programs():
    fuzz(200, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("level", ["L3", "L2"])
def test_five_thousand_runs_leave_nothing(level):
    try:
        open_sandbox(level).close()
    except Exception as error:
        pytest.skip(str(error))
    soak(level, 5000)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_five_thousand_random_programs():
    fuzz(5000, seed=2)
