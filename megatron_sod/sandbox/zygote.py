"""The host's end of the guest process: starts it in a fresh interpreter, hands it calls, ends it.

The host is never forked: it may hold CUDA contexts, Ray and threads.
"""

import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import tempfile
import threading

from megatron_sod.errors import SandboxError

from . import interpreter
from .scratch import ScratchFolder

_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from guest.zygote import main; main()"
_START_TIMEOUT_S = 120.0  # importing sympy on a busy machine takes seconds
# Ids that neither distributions nor systemd hand out; the second range is for containers, where
# only the first 65,536 exist.
UID_RANGES = (range(1_900_000_000, 1_900_004_096), range(60_600, 61_184))


def memory_file(data):
    """An anonymous file holding `data`, read from its start; nobody can write to it any more."""
    descriptor = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def usable_uids():
    """The first range of UID_RANGES that exists in this user namespace; empty when none does."""
    with open("/proc/self/uid_map") as file:
        mapped = [tuple(map(int, line.split())) for line in file]
    for uids in UID_RANGES:
        if any(first <= uids[0] and uids[-1] < first + count for first, _, count in mapped):
            return uids
    return range(0)


def claim_uids(count):
    """(uids, their locks): unprivileged ids no other sandbox on this machine uses now.

    The lock is an abstract socket, which the kernel frees with its process.
    """
    uids: list[int] = []
    locks: list[socket.socket] = []
    for uid in usable_uids():
        if len(uids) == count:
            break
        lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            lock.bind(f"\0sod-sandbox-uid-{uid}")
        except OSError:
            lock.close()
            continue
        uids.append(uid)
        locks.append(lock)
    if len(uids) == count:
        return uids, locks
    for lock in locks:
        lock.close()
    raise SandboxError(
        f"{count} free user ids are needed, {len(uids)} are left; lower max_concurrency or close "
        "other sandboxes"
    )


class Zygote:
    """A running guest process. `start` raises SandboxError when it cannot be what it must be."""

    def __init__(self, config, num_slots):
        self._config = dict(config)
        self._num_slots = num_slots
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._socket: socket.socket | None = None
        self._folder: ScratchFolder | None = None
        self._uid_locks: list[socket.socket] = []

    def start(self):
        config = self._config
        config["owner_pid"] = os.getpid()
        config["uid"], config["uids"] = None, []
        try:
            if config["drops_uid"]:
                uses_namespaces = config["level"] == "L3"
                uids, self._uid_locks = claim_uids(1 if uses_namespaces else self._num_slots)
                config["uid" if uses_namespaces else "uids"] = uids[0] if uses_namespaces else uids
            if config["level"] != "L3":
                self._folder = ScratchFolder()
                config["scratch_base"] = self._folder.path
            self._launch(config)
            self._await_ready(self._socket)
        except BaseException:
            self.stop()
            raise

    def _launch(self, config):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        config_fd = memory_file(json.dumps(config).encode())
        here = os.path.dirname(os.path.abspath(__file__))
        command = [*config["python"], "-c", _BOOT, here, str(theirs.fileno()), str(config_fd)]
        self._socket = ours
        self._errors = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                command,
                env=interpreter.guest_environment(),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=(theirs.fileno(), config_fd),
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(f"the guest interpreter does not start: {error}") from None
        finally:
            theirs.close()
            os.close(config_fd)

    def _await_ready(self, answers):
        poller = select.poll()
        poller.register(answers, select.POLLIN)
        answer = b""
        if poller.poll(_START_TIMEOUT_S * 1000):
            answer = answers.recv(65536)
        message = json.loads(answer) if answer else {}
        if "ready" in message:
            return
        reason = message.get("failed")
        if reason is None:
            self._errors.seek(0)
            reason = self._errors.read(4000).decode(errors="replace").strip()[-600:]
        raise SandboxError(reason or f"no answer within {_START_TIMEOUT_S:g} s")

    def spawn(self, slot, descriptors):
        """Starts a call. Raises BrokenPipeError when the process is gone."""
        with self._lock:
            if self._socket is None:
                raise BrokenPipeError("the guest process is gone or the sandbox closed")
            socket.send_fds(self._socket, [str(slot).encode()], descriptors)

    def is_dead(self, wait_s=2.0):
        """Whether the process ended; it may be ending while its calls already have."""
        process = self._process
        if process is None:
            return True
        try:
            process.wait(timeout=wait_s)
            return True
        except subprocess.TimeoutExpired:
            return False

    @property
    def pid(self):
        """None when it is not running."""
        return self._process.pid if self._process is not None else None

    def stop(self):
        """Ends the process and what it started; idempotent."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
        process, self._process = self._process, None
        if process is not None:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
            self._errors.close()
        if self._folder is not None:
            self._folder.remove()
            self._folder = None
        for lock in self._uid_locks:
            lock.close()
        self._uid_locks = []
