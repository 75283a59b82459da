"""One call, seen from its supervisor: isolate, start the program, watch, end everything, report.

The supervisor holds one end of the call's control socket. A message or the end of file there means
"stop now"; its own report is one JSON object, with a descriptor of the fetched files if any:
    {"exit": code, "memory": bool, "stopped": reason or null, "clean": bool}
    {"infra": "what could not be done"}
A negative exit code is the signal that ended the program; the reasons are "asked", "memory",
"scratch" and "processes".
"""

import json
import mmap
import os
import resource
import select
import signal
import socket
import struct
import sys
import time

from . import files, host, linux, namespaces, processes, runner

_GRACE_S = 0.2  # how long a program's own children may outlive it, to finish their output
_WATCH_S = 0.05  # interval of the memory and scratch watch


class Call:
    """Descriptors and texts of one request, as the zygote received them."""

    def __init__(self, descriptors):
        self.payload_fd, self.stdin_fd, self.stdout_fd, self.stderr_fd, control_fd = descriptors
        self.control = socket.socket(fileno=control_fd)
        with open(self.payload_fd, "rb", closefd=False) as file:
            header = json.loads(file.readline())
            self.source = file.read(header["source_bytes"])
            self.files = [(name, file.read(size)) for name, size in header["files"]]
        self.limits = header["limits"]
        self.echo, self.fetch = header["echo"], header["fetch"]

    def report(self, message, descriptor=None):
        data = json.dumps(message).encode()
        try:
            if descriptor is None:
                self.control.send(data)
            else:
                socket.send_fds(self.control, [data], [descriptor])
        except OSError:
            pass  # the caller is gone; there is nobody to tell


def supervise(call, config, slot):
    """Runs the call to its end and leaves this process. Never returns."""
    scratch = None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _keep_only(call, config)
        uses_namespaces = config["level"] == "L3"
        if uses_namespaces:
            scratch = namespaces.isolate_call(call.limits)
        else:
            scratch = host.isolate_call(config, slot)
        page = mmap.mmap(-1, 4096) if config["warm"] else _shared_file_page()
        pipe = os.pipe()
        program = os.fork()
        if program == 0:
            _become_program(call, config, slot, scratch, page, pipe)
        os.close(pipe[1])
        message, descriptor = _watch(call, config, slot, scratch, program, page, pipe[0])
    except BaseException as error:
        message, descriptor = {"infra": f"{type(error).__name__}: {error}"}, None
        processes.kill_tree(config["level"] == "L3", _uid(config, slot))
    if scratch is not None and config["level"] != "L3":
        host.remove_scratch(scratch)
    call.report(message, descriptor)
    os._exit(0)


def _uid(config, slot):
    return config["uids"][slot] if config["uids"] else None


def _keep_only(call, config):
    """Standard descriptors go to /dev/null, the rest but this call's are closed."""
    kept = {call.payload_fd, call.stdin_fd, call.stdout_fd, call.stderr_fd, call.control.fileno()}
    low = 3
    for descriptor in sorted(kept):
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, 65536)


class _StatusPage(mmap.mmap):
    """A status page that a fresh interpreter can map too: it comes with its descriptor."""

    descriptor = -1


def _shared_file_page():
    descriptor = os.memfd_create("status")
    os.ftruncate(descriptor, 4096)
    page = _StatusPage(descriptor, 4096)
    page.descriptor = descriptor
    return page


def _become_program(call, config, slot, scratch, page, pipe):
    """In the program's process: last restrictions, then the program. Never returns.

    A failure before the program's first line is written to the pipe: it is ours, not the model's.
    """
    try:
        os.close(pipe[0])
        os.setsid()
        linux.die_with_parent(signal.SIGKILL)
        for source, target in ((call.stdin_fd, 0), (call.stdout_fd, 1), (call.stderr_fd, 2)):
            os.dup2(source, target, inheritable=True)
        _set_limits(call.limits, config)
        if config["level"] == "L3":
            namespaces.enter_guest()
        else:
            host.enter_guest(config, slot, scratch)
        os.chdir(scratch)
        files.write_all([*call.files, (runner.FILE_NAME, call.source)])
        os.environ["HOME"] = os.environ["TMPDIR"] = scratch
        for number in range(1, signal.NSIG):
            if number not in (signal.SIGKILL, signal.SIGSTOP) and number not in (32, 33):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        source_fd = _source_file(call)
        if config["seccomp"]:
            linux.no_new_privileges()
            linux.install_seccomp(_own_filter(config))
        if config["warm"]:
            _run_warm(call, page, pipe[1])
        _run_cold(call, config, page, pipe[1], source_fd)
    except BaseException as error:
        os.write(pipe[1], f"E{type(error).__name__}: {error}"[:500].encode())
    finally:
        os._exit(125)


def _own_filter(config):
    """The filter with this process's pid put in where it lets signals reach only itself."""
    marker = bytes.fromhex(config["own_pid_marker"])
    return bytes.fromhex(config["seccomp"]).replace(marker, struct.pack("=I", os.getpid()))


def _run_warm(call, page, started_fd):
    """In this fork: the zygote's modules are there; its own are taken out of sight."""
    started = os.dup2(started_fd, 3, inheritable=False) if started_fd != 3 else 3
    os.closerange(4, 65536)
    for name in [n for n in sys.modules if n == "guest" or n.startswith("guest.")]:
        del sys.modules[name]
    runner.standard_streams()
    runner.reseed()
    runner.run_program(call.source, call.echo, page, started)


def _source_file(call):
    """The program in a file without a name; made before the filter, which refuses the call."""
    descriptor = os.memfd_create("source")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(call.source)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _run_cold(call, config, page, started_fd, source_fd):
    """A fresh interpreter; the runner travels as text, so no path of ours must be readable."""
    high = [os.dup(fd) for fd in (source_fd, started_fd, page.descriptor)]
    while min(high) < 6:  # out of the way of the three targets
        high = [os.dup(fd) for fd in high]
    for source, target in zip(high, (3, 4, 5), strict=True):
        os.dup2(source, target, inheritable=True)
    os.closerange(6, 65536)
    arguments = [*config["python"], "-c", config["cold_source"], "echo" if call.echo else "plain"]
    try:
        os.execve(arguments[0], arguments, dict(os.environ))
    except OSError as error:
        os.write(4, f"E{arguments[0]}: {error.strerror}".encode())


def _set_limits(limits, config):
    """rlimits, soft and hard; a hard limit that is already lower stays."""
    num_processes = limits["num_processes"]
    if config["level"] != "L3" and not config["uids"]:
        num_processes += _tasks_of_user()  # without a namespace the whole user is counted
    wanted = {
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_CPU: limits["cpu_s"],
        resource.RLIMIT_NPROC: num_processes,
        resource.RLIMIT_NOFILE: limits["num_files"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_STACK: limits["stack_bytes"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_NICE: 0,
        resource.RLIMIT_RTPRIO: 0,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(kind, (value, value))
    if not config["warm"]:
        # libc gives every thread of a fresh interpreter a stack of this size; the runner raises it
        # for the main thread again.
        hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
        resource.setrlimit(resource.RLIMIT_STACK, (min(8 << 20, hard), hard))


def _tasks_of_user():
    """Threads of this uid on the host: RLIMIT_NPROC counts them all."""
    uid, count = os.getuid(), 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                if entry.stat().st_uid == uid:
                    count += len(os.listdir(f"/proc/{entry.name}/task"))
            except OSError:
                continue
    return count


def _watch(call, config, slot, scratch, program, page, started_fd):
    """Waits for the program's end or an order to stop, ends the rest, returns the report."""
    os.close(call.stdin_fd)
    os.close(call.stdout_fd)
    os.close(call.stderr_fd)
    status, stopped = _wait(call, config, scratch, program)
    ended, is_clean = processes.kill_tree(config["level"] == "L3", _uid(config, slot))
    if status is None:
        status = ended.get(program, signal.SIGKILL)
    os.set_blocking(started_fd, False)
    started = os.read(started_fd, 1024)
    if not started.startswith(b"S") and stopped != "asked":
        detail = started[1:].decode(errors="replace") or "the interpreter could not start"
        limit_mb = call.limits["memory_bytes"] >> 20
        return {"infra": f"{detail} (memory limit {limit_mb} MB)"}, None
    descriptor = files.read_all(scratch, call.fetch) if call.fetch else None
    code = os.waitstatus_to_exitcode(status)
    memory = page[0] == runner.MEMORY_ERROR
    return {"exit": code, "memory": memory, "stopped": stopped, "clean": is_clean}, descriptor


def _wait(call, config, scratch, program):
    """(wait status or None, why it was stopped or None)."""
    wake_read, wake_write = os.pipe()
    for descriptor in (wake_read, wake_write):
        os.set_blocking(descriptor, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # In a pid namespace the program could send it, and only SIGKILL comes from outside.
    signal.signal(signal.SIGTERM, signal.SIG_IGN if config["level"] == "L3" else lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    poller = select.poll()
    poller.register(wake_read, select.POLLIN)
    poller.register(call.control, select.POLLIN)
    status, deadline, next_watch = None, 0.0, time.monotonic() + _WATCH_S
    while True:
        ended, left = processes.reap()
        if program in ended:
            status = ended[program]
            deadline = time.monotonic() + _GRACE_S
        if status is not None and (not left or time.monotonic() >= deadline):
            return status, None
        events = dict(poller.poll(_WATCH_S * 1000))
        if call.control.fileno() in events:
            call.control.recv(64)  # left unread it would reset the connection under the report
            return status, None if status is not None else "asked"
        if wake_read in events and bytes([signal.SIGTERM]) in os.read(wake_read, 4096):
            return status, "asked"  # the zygote died
        if time.monotonic() >= next_watch:
            reason = _over_limits(call.limits, config, scratch)
            if reason:
                return status, reason
            next_watch = time.monotonic() + _WATCH_S


def _over_limits(limits, config, scratch):
    """ "memory", "processes" or "scratch" when the call as a whole exceeds its share, else None."""
    pids = processes.descendants(os.getpid())
    # The second line behind RLIMIT_NPROC, which without a namespace counts the whole user.
    if len(pids) > limits["num_processes"]:
        return "processes"
    # One process alone is held by RLIMIT_AS already.
    if len(pids) > 1 and processes.tree_exceeds(pids, limits["memory_bytes"]):
        return "memory"
    if config["level"] != "L3":
        num_files, num_bytes = files.usage(scratch, limits["scratch_files"])
        if num_files > limits["scratch_files"] or num_bytes > limits["scratch_bytes"]:
            return "scratch"
    return None
