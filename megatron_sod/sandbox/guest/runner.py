"""Runs one program inside an isolated process as `python main.py` would, plus the echo.

Used two ways: called in a fork of the zygote (warm), or passed as text to a fresh interpreter
(cold), which is why it imports nothing but the standard library and none of its siblings.

The last statement, when it is an expression, is compiled in "single" mode, so its value reaches
sys.displayhook as in a notebook; nothing of the program is rewritten.
"""

import ast
import atexit
import builtins
import gc
import io
import os
import signal
import sys
import threading
import types

FILE_NAME = "main.py"
MEMORY_ERROR = 1  # value of the status page's first byte when a MemoryError ended the program
_FUTURES = 0x1FE0000  # the compiler flags of `from __future__` statements


def standard_streams():
    """Fresh stdin, stdout and stderr over descriptors 0-2, as the interpreter makes them."""
    for number, name, errors in (
        (0, "stdin", "surrogateescape"),
        (1, "stdout", "surrogateescape"),
        (2, "stderr", "backslashreplace"),
    ):
        raw = io.FileIO(number, "rb" if number == 0 else "wb", closefd=False)
        raw.name = f"<{name}>"
        buffered = io.BufferedReader(raw) if number == 0 else io.BufferedWriter(raw)
        newline = "\n" if number else None
        # Line-buffered, as at a terminal: what was printed before a timeout is not lost.
        text = io.TextIOWrapper(buffered, "utf-8", errors, newline, line_buffering=number > 0)
        text.__dict__["mode"] = "r" if number == 0 else "w"
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)


def reseed():
    """Fresh entropy for numpy's global generator, which a fork would otherwise share."""
    random = sys.modules.get("numpy.random")
    if random is not None:
        random.seed()


def _main_module():
    module = types.ModuleType("__main__")
    module.__file__ = FILE_NAME
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    return module


def _compile(source, echo):
    """Code objects to run in order: the program, and the last expression where it is echoed."""
    tree = ast.parse(source, FILE_NAME)
    last = None
    if echo and tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Interactive(body=[tree.body.pop()])
    codes = [compile(tree, FILE_NAME, "exec", dont_inherit=True)]
    if last is not None:
        flags = codes[0].co_flags & _FUTURES
        codes.append(compile(last, FILE_NAME, "single", flags=flags, dont_inherit=True))
    return codes


def _exit_code(value):
    """The exit code of SystemExit(value), by Python's rules; a text goes to stderr."""
    if value is None:
        return 0
    if isinstance(value, int):
        return value & 0xFF
    print(value, file=sys.stderr)
    return 1


def _report(error, traceback, page):
    """Hands an uncaught error to sys.excepthook without our own frames. Returns the exit code."""
    if isinstance(error, MemoryError):
        page[0] = MEMORY_ERROR
    if isinstance(error, SystemExit):
        return _exit_code(error.code)
    sys.excepthook(type(error), error.with_traceback(traceback), traceback)
    return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def _finish(
    code,
    leave=os._exit,
    kill=os.kill,
    shutdown=threading._shutdown,  # type: ignore[attr-defined]
    run_at_exit=atexit._run_exitfuncs,
    modules=sys.modules,
    names=builtins.__dict__,
    collect=gc.collect,
):
    """What an interpreter does at its end (threads, atexit, __del__, flush), without tearing down
    the modules shared with the zygote; the names are bound early, for the program may delete them.
    """
    try:
        shutdown()
        run_at_exit()
        modules.pop("__main__", None)  # the last reference: what only the program held goes now
        names.pop("_", None)
        collect()
    except BaseException:
        pass
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BaseException:
            code = code or 120  # what CPython returns when the last flush fails
    if code == -signal.SIGINT:  # CPython ends an uncaught KeyboardInterrupt by the signal itself
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        kill(os.getpid(), signal.SIGINT)
    leave(code)


def run_program(source, echo, page, started_fd):
    """Runs `source` (bytes, as the file's content) and leaves the process with its exit code.

    Args:
        source: the program's bytes.
        echo: whether the value of a last expression is printed.
        page: writable buffer shared with the supervisor; see MEMORY_ERROR.
        started_fd: gets one byte and is closed just before the program's first line.
    """
    namespace = _main_module().__dict__
    sys.argv[:] = [FILE_NAME]
    if "" not in sys.path:
        sys.path.append("")  # a module the program wrote can be imported, never shadow a library
    os.write(started_fd, b"S")
    os.close(started_fd)
    code = 0
    try:
        codes = _compile(source, echo)
    except BaseException as error:
        code = _report(error, None, page)
        codes = []
    try:
        for compiled in codes:
            exec(compiled, namespace)
    except BaseException as error:
        traceback = error.__traceback__
        try:
            code = _report(error, traceback.tb_next if traceback else None, page)
        except BaseException:
            code = 1
        del error, traceback
    del namespace, codes
    _finish(code)


def cold_main():
    """Entry of a fresh interpreter: descriptors 3 = source, 4 = started pipe, 5 = status page."""
    import mmap
    import resource

    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))
    standard_streams()
    duplicate = os.dup(5)  # the lowest free number: mmap takes it next, for a copy it keeps open
    os.close(duplicate)
    page = mmap.mmap(5, 4096)
    os.close(duplicate)
    os.close(5)
    with open(3, "rb") as file:
        source = file.read()
    run_program(source, sys.argv[1] == "echo", page, 4)
