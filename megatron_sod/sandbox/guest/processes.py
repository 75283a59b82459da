"""The processes of a call, as its supervisor sees them: memory, counting, killing."""

import os
import signal
import time

_PAGE = os.sysconf("SC_PAGESIZE")


def _children(pid):
    """Pids of the direct children; empty when the process is gone or /proc is not there."""
    found = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                found += [int(p) for p in file.read().split()]
    except OSError:
        pass
    return found


def descendants(root):
    """Every process below `root`; orphans are among them because the supervisor adopts them."""
    found, stack = [], [root]
    while stack:
        for child in _children(stack.pop()):
            found.append(child)
            stack.append(child)
    return found


def _resident_bytes(pid):
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def _proportional_bytes(pid):
    """Resident memory with shared pages divided among their users (Pss); 0 when gone."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return _resident_bytes(pid)
    return 0


def tree_exceeds(pids, limit_bytes):
    """Whether the processes together hold more than the limit.

    The cheap sum counts pages shared with the zygote once per process, so it only decides when
    the exact one is worth reading.
    """
    if sum(map(_resident_bytes, pids)) <= limit_bytes:
        return False
    return sum(map(_proportional_bytes, pids)) > limit_bytes


def reap():
    """Collects every ended child. Returns ({pid: wait status}, whether any child is left)."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended, False
        if pid == 0:
            return ended, True
        ended[pid] = status


def _kill_once(is_init, uid):
    if is_init:
        targets = [-1]  # in a pid namespace: every process but this one
    elif uid is not None:
        _kill_as(uid)
        targets = []
    else:
        targets = descendants(os.getpid())
    for pid in targets:
        try:
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def _kill_as(uid):
    """kill(-1) as the slot's user reaches each of its processes at once, whatever they fork."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.kill(-1, signal.SIGKILL)
        except OSError:
            pass
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def kill_tree(is_init, uid, patience_s=5.0):
    """Ends every process of the call. Returns ({pid: wait status}, whether all are gone)."""
    ended: dict[int, int] = {}
    deadline = time.monotonic() + patience_s
    while True:
        more, left = reap()
        ended.update(more)
        if not left:
            return ended, True
        if time.monotonic() > deadline:
            return ended, False
        _kill_once(is_init, uid)
        time.sleep(0.001)
