"""A short conformance check of an open sandbox on the user's machine; tools/doctor.py calls it."""

import os
import socket
import tempfile

from .limits import Limits

_REFUSED = (
    "try:\n  {statement}\n  print('reached')\nexcept Exception as error:\n  print('refused')\n"
)


def _refusals(port, folder, pid):
    """(name, statement that must fail inside, levels that promise it)."""
    strong = ("L3", "L2")
    every = ("L3", "L2", "L1")
    secret_path = f"{folder}/secret"
    libc = "import ctypes; l = ctypes.CDLL(None); "
    return [
        ("network", f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)", every),
        ("host files, reading", f"open({secret_path!r}).read()", strong),
        ("host files, writing", f"open({secret_path!r}, 'a')", every),
        ("writing outside", f"open({folder + '/new'!r}, 'w')", strong),
        ("environment of the host", f"open('/proc/{pid}/environ').read()", every),
        ("signals to the host", f"import os; os.kill({pid}, 0)", every),
        ("namespaces", libc + "assert l.unshare(0x10000000) == 0", every),
        ("debugging others", libc + "assert l.ptrace(16, 1, 0, 0) == 0", every),
        ("privileges", "import os; os.setuid(0)", every),
        ("raising limits", "import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))", every),
    ]


def _behaviours(limits):
    """(name, program, limits, what must be true of the result, as a function)."""
    brief = Limits(**{**vars(limits), "timeout_s": 1.0, "memory_mb": 256})
    daemon = (
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(60)\nprint('main ended')"
    )
    return [
        ("ordinary program", "print(6 * 7)", limits, lambda r: r.stdout == "42\n"),
        ("echo", "6 * 7", limits, lambda r: r.outcome == "ok"),
        ("program error", "1/0", limits, lambda r: (r.outcome, r.return_code) == ("user_error", 1)),
        ("time limit", "while True: pass", brief, lambda r: r.outcome == "timeout"),
        ("memory limit", "x = bytearray(1 << 40)", brief, lambda r: r.outcome == "memory"),
        (
            "output limit",
            "while True: print('x' * 65536)",
            limits,
            lambda r: r.outcome in ("output_limit", "timeout") and len(r.stdout) <= 65536,
        ),
        (
            "fork bomb",
            "import os\nwhile True: os.fork()",
            brief,
            lambda r: r.outcome in ("user_error", "timeout"),
        ),
        ("daemons end", daemon, limits, lambda r: r.outcome == "ok" and r.duration_s < 5),
        ("standard input", "print(input())", limits, lambda r: r.stdout == "given\n"),
    ]


def selfcheck(sandbox):
    """What the sandbox promises, tried out, in about five seconds.

    Args:
        sandbox: LocalSandbox.
    Returns:
        [(name, passed, detail)], one row per promise; a level's missing promise has no row. detail
        is "" when passed.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(folder, 0o777)  # only the sandbox stands between the program and this folder
        with open(f"{folder}/secret", "w") as file:
            file.write("secret")
        for name, statement, levels in _refusals(server.getsockname()[1], folder, os.getpid()):
            if sandbox.level in levels:
                result = sandbox.run(_REFUSED.format(statement=statement))
                rows.append(_row(name, result, result.stdout == "refused\n"))
    for name, program, limits, holds in _behaviours(sandbox.limits):
        if name == "fork bomb" and sandbox.level == "L0":
            continue  # nothing would hold it there
        result = sandbox.run(program, "given\n", limits=limits)
        rows.append(_row(name, result, holds(result)))
    first, second = (
        sandbox.run("import os; print(os.path.exists('left')); open('left', 'w').close()")
        for _ in range(2)
    )
    rows.append(_row("nothing survives a run", second, first.stdout == second.stdout == "False\n"))
    return rows


def _row(name, result, passed):
    if passed:
        return name, True, ""
    said = (result.stderr or result.stdout or result.detail).strip()[-200:]
    return name, False, f"{result.outcome}, exit code {result.return_code}: {said}"
