"""Others' output goes to a file, ours to the terminal, an error to the terminal again.

Layer: child processes with pipes; descriptors cannot be tested inside pytest, which holds them.
"""

import subprocess
import sys

from megatron_sod.observe.terminal import keep_worker_logs

CHILD = """
import logging, os, subprocess, sys
from pathlib import Path
early = logging.StreamHandler()                      # holds sys.stderr from before, as vLLM's does
logging.getLogger("early").addHandler(early)
from megatron_sod.observe import terminal
from megatron_sod.observe.progress import say
log = Path(sys.argv[1])
print("before")
try:
    with terminal.others_into(log):
        print("python print")
        os.write(2, b"from C\\n")
        logging.getLogger("early").warning("from a logger")
        subprocess.run(["sh", "-c", "echo from a child; echo and its errors >&2"])
        say("for the person")
        if sys.argv[2] == "fail":
            raise RuntimeError("broken inside")
finally:
    print("after")
"""
OTHERS = ("python print", "from C", "from a logger", "from a child", "and its errors")


def _run(log, how) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(log), how], capture_output=True, text=True, timeout=120
    )


def test_others_write_into_the_log_and_we_to_the_terminal(tmp_path):
    log = tmp_path / "logs/rank_0.log"
    done = _run(log, "well")
    assert done.returncode == 0 and done.stdout == "before\nafter\n"
    assert done.stderr == "for the person\n"
    kept = log.read_text()
    assert all(words in kept for words in OTHERS) and "for the person" not in kept


def test_an_error_is_shown_on_the_terminal(tmp_path):
    done = _run(tmp_path / "log", "fail")
    assert done.returncode == 1 and "RuntimeError: broken inside" in done.stderr
    assert "broken inside" not in (tmp_path / "log").read_text()


def test_a_second_run_appends(tmp_path):
    log = tmp_path / "log"
    log.write_text("earlier\n")
    _run(log, "well")
    assert log.read_text().startswith("earlier\n") and "from C" in log.read_text()


def test_workers_logs_are_kept_under_their_actors_names(tmp_path):
    session, kept = tmp_path / "session", tmp_path / "kept"
    session.mkdir()
    (session / "worker-aa-01-477.out").write_text(":job_id:01\n:actor_name:Engine\nloading\n")
    (session / "worker-bb-01-478.err").write_text(":job_id:01\n:actor_name:RolloutWorker\n")
    (session / "worker-cc-01-479.err").write_text("x" * 50 + "the end")
    (session / "raylet.out").write_text("Ray's own")
    keep_worker_logs(session, kept, max_bytes=40)
    assert sorted(path.name for path in kept.iterdir()) == ["Engine-477.out", "worker-479.err"]
    assert "loading" in (kept / "Engine-477.out").read_text()
    assert (kept / "worker-479.err").read_text() == "x" * 33 + "the end"


def test_no_session_no_logs(tmp_path):
    keep_worker_logs(tmp_path / "none", tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
