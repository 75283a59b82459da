"""Folders of programs go with their sandbox, and those of killed processes with the next opening.

Layers: pure -> a process that is killed while its sandbox is open.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from megatron_sod.errors import SandboxError
from megatron_sod.sandbox import open_sandbox, scratch
from megatron_sod.sandbox.scratch import ScratchFolder

ROOT = Path(__file__).resolve().parents[2]
OWNER = """
import time
from megatron_sod.sandbox import open_sandbox
sandbox = open_sandbox("L0", allow_unsafe=True)
sandbox.run("open('f', 'w').write('x')")
print("open", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Stands in for /tmp, where other sandboxes are at work."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def _owner(folder):
    """A process with an open sandbox."""
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OWNER]
    owner = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "open\n"
    return owner


def _end(owner):
    owner.send_signal(signal.SIGKILL)
    owner.communicate()


def test_a_closed_sandbox_leaves_nothing(folder):
    with open_sandbox("L0", allow_unsafe=True) as sandbox:
        assert sandbox.run("open('f', 'w').write('x')").outcome == "ok"
        assert len(list(folder.iterdir())) == 1
    assert list(folder.iterdir()) == []


def test_the_next_opening_removes_what_a_killed_process_left_and_nothing_else(folder):
    killed, living = _owner(folder), _owner(folder)
    (leftover,) = folder.glob(f"sod-sandbox-{killed.pid}-*")
    (held,) = folder.glob(f"sod-sandbox-{living.pid}-*")
    _end(killed)
    (leftover / "0" / "deep").mkdir(parents=True)
    (leftover / "0" / "deep" / "f").write_text("x")
    others = [folder / "other", folder / "sod-sandbox-a1b2c3d4"]
    for other in others:
        (other / "kept").mkdir(parents=True)
    link = folder / "sod-sandbox-1-abcdefgh"
    link.symlink_to(others[0])
    try:
        ScratchFolder().remove()
        assert set(folder.iterdir()) == {held, link, *others}
        assert all((other / "kept").is_dir() for other in others)
    finally:
        _end(living)
    ScratchFolder().remove()
    assert not held.exists()


def test_folders_of_another_user_are_left_alone(folder, monkeypatch):
    other = folder / "sod-sandbox-1-abcdefgh"
    other.mkdir()
    monkeypatch.setattr(scratch.os, "geteuid", lambda: other.stat().st_uid + 1)
    scratch.remove_leftovers()
    assert other.is_dir()


def test_a_folder_taken_for_a_leftover_before_it_is_held_is_replaced(folder, monkeypatch):
    made, make = [], tempfile.mkdtemp

    def make_and_lose_the_first(**options):
        made.append(make(**options))
        if len(made) == 1:
            scratch.remove_leftovers()  # as another process does that opens its sandbox now
        return made[-1]

    monkeypatch.setattr(scratch.tempfile, "mkdtemp", make_and_lose_the_first)
    mine = ScratchFolder()
    assert len(made) == 2 and mine.path == made[1] and os.path.isdir(mine.path)
    mine.remove()


def test_a_folder_that_cannot_be_locked_is_an_error_and_is_removed(folder, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(scratch.fcntl, "flock", refuse)
    with pytest.raises(SandboxError, match="TMPDIR"):
        ScratchFolder()
    assert list(folder.iterdir()) == []


def test_sandboxes_opened_and_closed_at_once_keep_their_folders(folder):
    lost = []

    def work():
        for _ in range(40):
            mine = ScratchFolder()
            os.mkdir(f"{mine.path}/0")
            scratch.remove_leftovers()
            if not os.path.isdir(f"{mine.path}/0"):
                lost.append(mine.path)
            mine.remove()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not lost and list(folder.iterdir()) == []
