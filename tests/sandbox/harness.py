"""Runs the whole table in a process of its own, as root or another user, and prints JSON.

    SECRET_TOKEN=<mark> python -m tests.sandbox.harness --level L2 --uid 65534 --python PATH

One process per (level, user): the secret must be in the environment before exec, and a program
that gets out must hit this process and not the test runner. Prints {"results": {name: result},
"end": {"untouched", "survivors", "still"}, "shared"}.
"""

import argparse
import dataclasses
import json
import os
import socket
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

from megatron_sod.sandbox import Limits, open_sandbox
from megatron_sod.sandbox.guest import linux, processes

from . import cases, cases_control, cases_python

MARK = "mark-9431-of-the-host"
LIMITS = Limits(
    timeout_s=1.2,
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
BUSY = """fork_bomb mem_bomb mem_bomb_caught mem_fork_mult mem_mmap_shared busy_loop c_level_hang
bignum_hang disk_fill_many inode_fill infinite_output infinite_stderr kill_minus1 gc_del_bomb
recursion_limit_raised compile_bomb parser_bomb""".split()
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
        self.datagram_path = f"{self.folder}/datagram"
        self.datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.datagram.bind(self.datagram_path)
        os.chmod(self.unix_path, 0o777)
        os.chmod(self.datagram_path, 0o777)

    def fill(self, code):
        values = {"@PORT@": str(self.tcp.getsockname()[1]), "@UNIX@": self.unix_path}
        values |= {"@DGRAM@": self.datagram_path, "@HOSTFILE@": self.file, "@MARK@": MARK}
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
        try:
            self.datagram.recv(10, socket.MSG_DONTWAIT)
            return False
        except BlockingIOError:
            pass
        status = os.stat(self.file)
        with open(self.file) as file:
            return file.read() == "precious" and status.st_mode & 0o777 == 0o644


def run_table(sandbox, host, names, level, is_shared):
    """{name: result as a dict}. The busy programs run two at a time, the waiting ones eight.

    A program that should have ended in time but was starved by its neighbours runs once more,
    alone and with more time; nothing but a timeout is ever tried again.
    """
    seen = {}

    def run(name, limits=LIMITS):
        case = ALL[name]
        return dataclasses.asdict(sandbox.run(host.fill(case.code), case.stdin, limits=limits))

    busy = [name for name in names if name in BUSY]
    waiting = [name for name in names if name not in BUSY]
    results = {}
    with ThreadPoolExecutor(2) as few, ThreadPoolExecutor(8) as many:
        pending = [(few.map(run, busy), busy), (many.map(run, waiting), waiting)]
        for answers, group in pending:
            results.update(zip(group, answers, strict=True))
    for name, result in list(results.items()):
        starved = result["outcome"] == "timeout" and level in ALL[name].levels
        if starved and not ALL[name].holds(result, level, is_shared, seen):
            results[name] = run(name, dataclasses.replace(LIMITS, timeout_s=10.0))
    return results


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--level", required=True)
    parser.add_argument("--uid", type=int)
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--names", nargs="*")
    parser.add_argument("--closed", action="store_true", help="leave the interpreter where it is")
    options = parser.parse_args()
    linux.become_subreaper()  # whatever outlives its call or its sandbox shows up below us
    needs_way = options.uid is not None or options.level != "L3"
    if os.getuid() == 0 and needs_way and not options.closed:
        open_the_way([sys.base_prefix, sys.prefix, os.getcwd()])
    if options.uid is not None:
        os.setgroups([])
        os.setresgid(options.uid, options.uid, options.uid)
        os.setresuid(options.uid, options.uid, options.uid)
        linux.set_dumpable(True)
    host = Host()
    is_shared = os.getuid() != 0 and options.level != "L3"
    arguments = {"limits": LIMITS, "timeout_s": LIMITS.timeout_s, "memory_mb": LIMITS.memory_mb}
    with open_sandbox(options.level, warm=bool(options.warm), **arguments) as sandbox:
        names = options.names or list(ALL)
        results = run_table(sandbox, host, names, options.level, is_shared)
        still = sandbox.run("print('served')").stdout
    left = processes.descendants(os.getpid())
    end = {"untouched": host.is_untouched(), "survivors": left, "still": still}
    # A result may hold a lone surrogate or NUL: ASCII with escapes carries anything.
    print(json.dumps({"results": results, "end": end, "shared": is_shared}))


if __name__ == "__main__":
    main()
