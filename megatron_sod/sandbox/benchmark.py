"""Latency and throughput of the sandbox against a plain `python program.py`, in the same run.

    python -m megatron_sod.sandbox.benchmark [--out docs/benchmarks/sandbox.md] [--seconds 5]

The ways are measured in turns, round by round, so that a busy machine slows all of them alike.
"""

import argparse
import concurrent.futures
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

from . import interpreter
from .ladder import open_sandbox

PROGRAMS = {
    "print": "print(6 * 7)",
    "sympy": "import sympy\nx = sympy.symbols('x')\nprint(sympy.factor(x**4 - 1))",
}


def run_plain(path):
    """What a caller without a sandbox does: start an interpreter on a file, wait for its text."""
    command = [*interpreter.interpreter_command(sys.executable), path]
    environment = {**interpreter.guest_environment(), "HOME": "/tmp", "TMPDIR": "/tmp"}
    return subprocess.run(command, capture_output=True, env=environment).returncode == 0


def latencies_ms(ways, num_rounds):
    """{way: [milliseconds]} for {way: callable}, one call of each way per round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(num_rounds):
        for name, call in ways.items():
            started_at = time.perf_counter()
            if not call():
                raise RuntimeError(f"the program failed: {name}")
            times[name].append((time.perf_counter() - started_at) * 1000)
    return times


def rate_per_s(call, num_threads, seconds):
    """Programs per second with so many callers at the same time."""
    deadline = time.perf_counter() + seconds

    def work(_):
        count = 0
        while time.perf_counter() < deadline:
            count += call()
        return count

    started_at = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        total = sum(pool.map(work, range(num_threads)))
    return total / (time.perf_counter() - started_at)


def measure(num_rounds, seconds):
    """(rows of the latency table, rows of the rate table, facts)."""
    num_threads = 2 * len(os.sched_getaffinity(0))
    latency_rows, rate_rows, medians = [], [], {}
    with (
        tempfile.TemporaryDirectory() as folder,
        open_sandbox(preload=("numpy", "sympy"), timeout_s=60) as warm,
        open_sandbox(warm=False, timeout_s=60) as cold,
    ):
        for program, code in PROGRAMS.items():
            path = f"{folder}/{program}.py"
            with open(path, "w") as file:
                file.write(code)
            ways = {
                "plain subprocess": lambda path=path: run_plain(path),
                "sandbox, cold": lambda code=code: cold.run(code).outcome == "ok",
                "sandbox, warm": lambda code=code: warm.run(code).outcome == "ok",
            }
            for way, times in latencies_ms(ways, num_rounds).items():
                ordered = sorted(times)
                medians[program, way] = statistics.median(times)
                values = (medians[program, way], ordered[int(len(ordered) * 0.95)], ordered[-1])
                latency_rows.append((program, way, *(f"{v:.1f}" for v in values)))
            for way, call in ways.items():
                rates = [rate_per_s(call, n, seconds) for n in (1, num_threads)]
                rate_rows.append((program, way, *(f"{r:.1f}" for r in rates)))
        started_at = time.perf_counter()
        flood = warm.run("print('x' * 10**7)")
        flood_s = time.perf_counter() - started_at
        facts = _facts(medians, warm.level, num_threads, flood, flood_s)
    return latency_rows, rate_rows, facts


def _facts(medians, level, num_threads, flood, flood_s):
    added = medians["print", "sandbox, cold"] - medians["print", "plain subprocess"]
    ratio = medians["sympy", "sandbox, cold"] / medians["sympy", "sandbox, warm"]
    with open("/proc/loadavg") as file:
        load = file.read().split()[0]
    return {
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, Linux {platform.release()}",
        "interpreter": f"Python {platform.python_version()}",
        "level": level,
        "load average at the end": load,
        "callers in the concurrent column": str(num_threads),
        "isolation adds at the median (cold against plain)": f"{added:.1f} ms",
        "a sympy program, warm against cold": f"{ratio:.1f} times faster",
        "10 MB of output": f"{flood.outcome} after {flood_s * 1000:.0f} ms, never blocks",
    }


def _table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(latency_rows, rate_rows, facts):
    """The page as Markdown."""
    latency_header = ["program", "way", "median ms", "95 % ms", "slowest ms"]
    rate_header = ["program", "way", "one caller, programs/s", "concurrent, programs/s"]
    return "\n\n".join(
        [
            "# Sandbox: latency and throughput",
            "Made by `python -m megatron_sod.sandbox.benchmark --out docs/benchmarks/sandbox.md`. "
            "All ways are measured in turns in one run. Cold starts a fresh interpreter inside "
            "the isolation, warm forks one that has numpy and sympy imported.",
            _table(["what", "value"], [list(item) for item in facts.items()]),
            _table(latency_header, latency_rows),
            _table(rate_header, rate_rows),
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", help="also write the page to this file")
    parser.add_argument("--rounds", type=int, default=30, help="calls of each way for latency")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each rate")
    arguments = parser.parse_args()
    page = report(*measure(arguments.rounds, arguments.seconds)) + "\n"
    print(page)
    if arguments.out:
        os.makedirs(os.path.dirname(arguments.out) or ".", exist_ok=True)
        with open(arguments.out, "w") as file:
            file.write(page)


if __name__ == "__main__":
    main()
