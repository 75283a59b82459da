"""Where programs keep their files at the levels that have no file system of their own.

A folder is held by a lock that the kernel frees with the process that opened the sandbox, however
that ends. One that nobody holds is a leftover, and the next opening removes it.
"""

import fcntl
import os
import re
import shutil
import tempfile

from megatron_sod.errors import SandboxError

_NAME = re.compile(r"sod-sandbox-\d+-\w+")  # the owner's pid, for those who look
_MAX_TRIES = 10


class ScratchFolder:
    """A new folder in the system's temporary one. Programs may pass through it, not list it."""

    def __init__(self):
        """
        Raises:
            SandboxError: the folder cannot be made or locked.
        """
        remove_leftovers()
        self.path, self._lock = _make()
        os.chmod(self.path, 0o711)

    def remove(self):
        """With all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_leftovers():
    """Removes the folders of this user that no living process holds."""
    try:
        with os.scandir(tempfile.gettempdir()) as entries:
            paths = [entry.path for entry in entries if _NAME.fullmatch(entry.name)]
    except OSError:
        return
    for path in paths:
        lock = _hold(path)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _make():
    """(path, lock) of a new folder."""
    for _ in range(_MAX_TRIES):
        try:
            path = tempfile.mkdtemp(prefix=f"sod-sandbox-{os.getpid()}-")
        except OSError as error:
            raise SandboxError(f"no folder for programs: {error}; set TMPDIR") from None
        lock = _hold(path)
        if lock is not None:
            return path, lock
        shutil.rmtree(path, ignore_errors=True)  # else taken for a leftover before it was held
    raise SandboxError(
        f"folders in {tempfile.gettempdir()} cannot be locked with flock, which shows whose they "
        "are; set TMPDIR to a folder on a local file system"
    )


def _hold(path):
    """A descriptor whose lock holds the folder; None when it is gone, another user's or held."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(lock)
        # Between the opening and the lock its last owner may have removed it.
        is_there = os.path.samestat(found, os.stat(path, follow_symlinks=False))
        if is_there and found.st_uid == os.geteuid():
            return lock
    except OSError:
        pass
    os.close(lock)
    return None
