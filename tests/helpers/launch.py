"""Start the real command lines and wait for them, leaving nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def start(tool: str, *arguments: str, nproc: int, log: Path) -> subprocess.Popen:
    """torchrun of a tool in its own process group; output goes to `log`.

    All its descendants, Ray's and vLLM's too, carry `marker_of(log)` in their environment.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(nproc), f"tools/{tool}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SOD_TEST_RUN": str(log)}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def marker_of(log: Path) -> str:
    """What `processes_of` finds the run by."""
    return f"SOD_TEST_RUN={log}"


def run(tool: str, *arguments: str, nproc: int, log: Path, timeout_s: float) -> str:
    """Run to the end; returns what was printed. A non-zero exit fails with the output."""
    process = start(tool, *arguments, nproc=nproc, log=log)
    try:
        code = process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        end(process)
        raise AssertionError(f"{tool} ran past {timeout_s} s:\n{log.read_text()[-4000:]}") from None
    assert code == 0, f"{tool} exited with {code}:\n{log.read_text()[-6000:]}"
    return log.read_text()


def end(process: subprocess.Popen) -> None:
    """End a process group this test started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait(timeout=30)


def processes_of(marker: str) -> list[int]:
    """Ids of live processes whose command line or environment names `marker`."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:
            continue
        if state != "Z" and marker.encode() in text:
            found.append(int(entry.name))
    return found


def ranks_of(log: Path) -> dict[int, int]:
    """Process ids of a run's trainer ranks by rank; Ray's and vLLM's processes are left out."""
    found = {}
    for pid in processes_of(marker_of(log)):
        try:
            text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        variables = dict(item.split("=", 1) for item in text.split("\0") if "=" in item)
        if "LOCAL_RANK" in variables and b"tools/train_" in command:
            found[int(variables["RANK"])] = pid
    return found
