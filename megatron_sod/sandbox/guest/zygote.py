"""The process every call is forked from: isolated first, then its modules imported, then serving.

Started as `python -c ... <folder> <socket fd> <config fd>`. It answers {"ready": ...} or
{"failed": reason} once, then takes requests: one slot number with five descriptors each.
It ends when its owner's socket closes or its owner's process ends, whichever is seen first.
"""

import array
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time

from . import linux, namespaces, processes, supervisor


def main():
    """Entry point. Leaves the process by os._exit."""
    server = socket.socket(fileno=int(sys.argv[2]))
    with open(int(sys.argv[3]), "rb") as file:
        config = json.loads(file.read())
    owner = os.pidfd_open(config["owner_pid"])
    try:
        _prepare(config)
    except BaseException as error:
        server.send(json.dumps({"failed": f"{type(error).__name__}: {error}"[:2000]}).encode())
        os._exit(1)
    server.send(json.dumps({"ready": sys.version.split()[0]}).encode())
    try:
        _serve(server, owner, config)
    finally:
        os._exit(0)


def _prepare(config):
    if config["level"] == "L3":
        namespaces.isolate_zygote(config)
    elif not config["uids"] and config["level"] != "L0":
        linux.no_new_privileges()
    sys.path[:] = [p for p in sys.path if p and p != sys.argv[1] and os.path.isdir(p)]
    for name in config["preload"]:
        importlib.import_module(name)
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("a preloaded module started a thread; a fork would lose it")
    importlib.invalidate_caches()
    gc.collect()
    gc.freeze()  # the collector of a fork leaves the shared objects, and their pages, alone


def _receive(server):
    """(slot, descriptors), or None at the end of file. Descriptors are close-on-exec."""
    size = socket.CMSG_SPACE(5 * 4)
    data, ancillary, _, _ = server.recvmsg(64, size, socket.MSG_CMSG_CLOEXEC)
    if not data:
        return None
    descriptors = array.array("i")
    for _level, _kind, content in ancillary:
        descriptors.frombytes(content[: len(content) - len(content) % 4])
    return int(data), list(descriptors)


def _serve(server, owner, config):
    poller = select.poll()
    poller.register(server, select.POLLIN)
    poller.register(owner, select.POLLIN)
    children: set[int] = set()
    while True:
        timeout_ms = 20 if children else -1
        events = dict(poller.poll(timeout_ms))
        ended, _ = processes.reap()
        children -= set(ended)
        if owner in events:
            return _end(children, config["level"])
        if server.fileno() in events:
            request = _receive(server)
            if request is None:
                return _end(children, config["level"])
            slot, descriptors = request
            pid = _start(slot, descriptors, server, config)
            if pid:
                children.add(pid)


def _start(slot, descriptors, server, config):
    """Forks the supervisor of one call. On failure the control socket closes unanswered or with
    a reason, which the owner reads as an infrastructure error."""
    try:
        pid = namespaces.spawn_supervisor() if config["level"] == "L3" else os.fork()
    except OSError as error:
        control = socket.socket(fileno=descriptors[-1])
        control.send(json.dumps({"infra": f"cannot start a process: {error}"}).encode())
        control.close()
        pid = None
        descriptors = descriptors[:-1]
    if pid == 0:
        try:
            server.detach()
            supervisor.supervise(supervisor.Call(descriptors), config, slot)
        finally:
            os._exit(1)
    for descriptor in descriptors:
        os.close(descriptor)
    return pid


def _end(children, level, patience_s=8.0):
    """The owner is gone or closes: every call ends now. The init of a namespace takes all of it
    along; another supervisor ends its tree when asked to."""
    for pid in children:
        os.kill(pid, signal.SIGKILL if level == "L3" else signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    while children and time.monotonic() < deadline:
        ended, _ = processes.reap()
        children -= set(ended)
        time.sleep(0.005)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
