"""Runs the whole table in a process of its own, as root or another user, and prints JSON.

    SECRET_TOKEN=<mark> python -m tests.sandbox.harness --level L2 --uid 65534 --python PATH

One process per (level, user): the secret must be in the environment before exec, and a program
that gets out must hit this process and not the test runner.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import socket
import sys
import tempfile

from megatron_sod.sandbox import Limits, open_sandbox
from megatron_sod.sandbox.guest import linux

from . import cases, cases_control, cases_python

MARK = "mark-9431-of-the-host"
LIMITS = Limits(
    timeout_s=1.5,
    memory_mb=256,
    num_processes=16,
    file_bytes=8 << 20,
    scratch_bytes=16 << 20,
    shm_bytes=16 << 20,
)
TABLES = {
    "resources": cases.RESOURCES,
    "time": cases.TIME,
    "processes": cases_control.PROCESSES,
    "network": cases_control.NETWORK,
    "files": cases_control.FILES,
    "streams": cases_python.STREAMS,
    "lookalikes": cases_python.LOOKALIKES,
    "interpreter": cases_python.INTERPRETER,
    "ordinary": cases_python.ORDINARY,
}
ALL = {case.name: case for table in TABLES.values() for case in table}
assert len(ALL) == sum(map(len, TABLES.values())), "two cases share a name"


def blocked_ancestor(path):
    """The first directory above `path` that other users may not enter, or None."""
    parts = os.path.realpath(path).split("/")
    for count in range(2, len(parts) + 1):
        folder = "/".join(parts[:count])
        if not os.stat(folder).st_mode & 0o001:
            return folder
    return None


def open_the_way(paths):
    """Makes `paths` reachable for every user, in a mount namespace of this process alone.

    An interpreter below /root (mode 700) is what other users of a machine would not have.
    """
    blocked = [(path, blocked_ancestor(path)) for path in map(os.path.realpath, paths)]
    blocked = [(path, folder) for path, folder in blocked if folder is not None]
    if not blocked:
        return
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
    aside = tempfile.mkdtemp()
    linux.mount("tmpfs", aside, "tmpfs", 0, "mode=0755")
    for number, (path, _) in enumerate(blocked):
        os.mkdir(f"{aside}/{number}")
        linux.mount(path, f"{aside}/{number}", None, linux.MS_BIND | linux.MS_REC)
    for folder in {folder for _, folder in blocked}:
        linux.mount("tmpfs", folder, "tmpfs", 0, "mode=0755")
    for number, (path, _) in enumerate(blocked):
        os.makedirs(path)
        linux.mount(f"{aside}/{number}", path, None, linux.MS_BIND | linux.MS_REC)


class Host:
    """What the programs must not reach: a TCP service, a UNIX socket, a file."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="host-")
        self.file = f"{self.folder}/precious"
        with open(self.file, "w") as file:
            file.write("precious")
        os.chmod(self.folder, 0o755)
        os.chmod(self.file, 0o644)
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.unix_path = f"{self.folder}/socket"
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(self.unix_path)
        self.unix.listen()

    def fill(self, code):
        values = {"@PORT@": str(self.tcp.getsockname()[1]), "@UNIX@": self.unix_path}
        values |= {"@HOSTFILE@": self.file, "@MARK@": MARK}
        for name, value in values.items():
            code = code.replace(name, value)
        return code

    def is_untouched(self):
        """Nobody connected, and the file is what it was."""
        for server in (self.tcp, self.unix):
            server.setblocking(False)
            try:
                server.accept()
                return False
            except BlockingIOError:
                pass
        status = os.stat(self.file)
        with open(self.file) as file:
            return file.read() == "precious" and status.st_mode & 0o777 == 0o644


def survivors():
    """Command lines of the processes below this one, and of any that carries the guest's mark."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                is_guest = b"HOME=/sandbox" in file.read()
            with open(f"/proc/{pid}/status") as file:
                is_child = f"PPid:\t{os.getpid()}\n" in file.read()
        except OSError:
            continue
        if is_guest or is_child:
            found.append(pid)
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--level", required=True)
    parser.add_argument("--uid", type=int)
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--names", nargs="*")
    options = parser.parse_args()
    if os.getuid() == 0 and (options.uid is not None or options.level != "L3"):
        open_the_way([sys.base_prefix, sys.prefix, os.getcwd()])
    if options.uid is not None:
        os.setgroups([])
        os.setresgid(options.uid, options.uid, options.uid)
        os.setresuid(options.uid, options.uid, options.uid)
        linux.set_dumpable(True)
    before = set(survivors())
    host = Host()
    names = options.names or list(ALL)
    with open_sandbox(
        level=options.level, limits=LIMITS, timeout_s=1.5, memory_mb=256, warm=bool(options.warm)
    ) as sandbox:

        def run(name):
            case = ALL[name]
            limits = dataclasses.replace(LIMITS)
            return sandbox.run(host.fill(case.code), case.stdin, limits=limits)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            results = dict(zip(names, pool.map(run, names), strict=True))
        still = sandbox.run("print('served')").stdout
    answer = {name: dataclasses.asdict(result) for name, result in results.items()}
    left = sorted(set(survivors()) - before)
    end = {"untouched": host.is_untouched(), "survivors": left, "still": still}
    # A result may hold a lone surrogate or NUL: ASCII with escapes carries anything.
    print(json.dumps({"results": answer, "end": end}))


if __name__ == "__main__":
    main()
