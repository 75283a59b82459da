"""What a guest may read: the interpreter, its libraries, the system's shared files."""

import json
import os
import subprocess
import sys

from megatron_sod.errors import SandboxError

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/libx32")
_SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives", "/etc/mime.types")
_QUESTION = (
    "import json, sys; print(json.dumps([sys.executable, sys.prefix, sys.exec_prefix, "
    "sys.base_prefix, sys.base_exec_prefix, *(p for p in sys.path "
    "if p.endswith(('site-packages', 'dist-packages')))]))"
)


def guest_environment():
    """The whole environment of a guest; nothing is inherited.

    One thread per numerical library, or OpenBLAS reserves address space per core; a fixed hash
    seed, so that student and teacher read the same text.
    """
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": "/sandbox",
        "TMPDIR": "/sandbox",
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONHASHSEED": "0",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "NUMEXPR_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
    }


def interpreter_command(python):
    """The command of a guest interpreter: no user site, no working directory on sys.path, no
    bytecode files, UTF-8 whatever the locale."""
    return [python, "-s", "-P", "-B", "-X", "utf8"]


def readable_paths(python):
    """({path in the guest: its real path}, [(link, target)]) for `python` (absolute path)."""
    if python == sys.executable:
        answer = [sys.executable, sys.prefix, sys.exec_prefix, sys.base_prefix]
        answer += [sys.base_exec_prefix]
        answer += [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    else:
        command = [*interpreter_command(python), "-c", _QUESTION]
        try:
            run = subprocess.run(command, env=guest_environment(), capture_output=True, timeout=30)
            answer = json.loads(run.stdout)
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            raise SandboxError(f"the interpreter {python} does not start: {error}") from None
    paths = {os.path.dirname(answer[0]), *answer[1:]}
    paths |= {os.path.realpath(p) for p in paths}
    links = []
    for path in _SYSTEM:
        if os.path.islink(path):
            links.append((path, os.readlink(path)))
        elif os.path.isdir(path):
            paths.add(path)
    paths |= {path for path in _SYSTEM_FILES if os.path.exists(path)}
    linked = tuple(link + "/" for link, _ in links)
    kept = (p for p in paths if p != "/" and os.path.exists(p) and not p.startswith(linked))
    return {path: os.path.realpath(path) for path in kept}, links


def is_closed(paths):
    """Whether a directory above one of the paths may not be entered by every user."""
    for path in paths:
        while path != "/":
            path = os.path.dirname(path)
            if not os.stat(path).st_mode & 0o001:
                return True
    return False
