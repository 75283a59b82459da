"""SandboxFusion's /run_code messages: our results as its words and back.

Request and response as documented by bytedance/SandboxFusion (Apache-2.0). Two optional fields are
added, which other servers and clients ignore: "echo" in the request, "outcome" and "detail" in
run_result, so that nothing is lost between our own client and server.
"""

import base64
import binascii
import math

from .result import FINISHED, NOT_RUN, OUTCOMES, STOPPED, SandboxResult, infra_error
from .source import check_files, check_name

LANGUAGES = frozenset(
    "python python2 cpp nodejs go go_test java php csharp bash typescript sql rust cuda lua R perl "
    "D_ut ruby scala julia pytest junit kotlin_script jest verilog python_gpu lean swift racket "
    "gtest react".split()
)
MAX_FILES = 1000
_SKIPPED_NAME = "IGNORE_THIS_FILE"


class RequestProblem(Exception):
    """A request that cannot be served: HTTP status, field, message."""

    def __init__(self, field, message, status=422):
        super().__init__(message)
        self.status = status
        self.body = {"detail": [{"loc": ["body", field], "msg": message, "type": "value_error"}]}


def _field(body, name, kind, default, words):
    value = body.get(name, default)
    is_number_wanted = kind == (int, float)
    if not isinstance(value, kind) or (is_number_wanted and isinstance(value, bool)):
        problem = "field required" if name not in body else f"must be {words}"
        raise RequestProblem(name, problem)
    return value


def parse_request(body, max_timeout_s, max_memory_mb):
    """A checked request: dict with code, language, stdin, timeout_s, memory_mb (None = default),
    files, fetch, echo. Raises RequestProblem."""
    if not isinstance(body, dict):
        raise RequestProblem("", "must be a JSON object")
    code = _field(body, "code", str, None, "a string")
    language = _field(body, "language", str, None, "a string")
    if language not in LANGUAGES:
        raise RequestProblem("language", f"unknown language {language[:40]!r}")
    timeout_s = _field(body, "run_timeout", (int, float), 10, "a number of seconds")
    _field(body, "compile_timeout", (int, float), 10, "a number of seconds")
    if not (math.isfinite(timeout_s) and 0 < timeout_s <= max_timeout_s):
        problem = f"must be above 0 and at most {max_timeout_s:g} seconds"
        raise RequestProblem("run_timeout", problem)
    memory_mb = _field(body, "memory_limit_MB", int, -1, "a whole number of MB")
    if memory_mb > max_memory_mb or memory_mb < -1 or memory_mb == 0:
        problem = f"must be -1 (the default) or at most {max_memory_mb} MB"
        raise RequestProblem("memory_limit_MB", problem)
    return {
        "code": code,
        "language": language,
        "stdin": _field(body, "stdin", (str, type(None)), None, "a string or null"),
        "timeout_s": timeout_s,
        "memory_mb": None if memory_mb == -1 else memory_mb,
        "files": _files(body),
        "fetch": _fetch(body),
        "echo": _field(body, "echo", bool, False, "true or false"),
    }


def _files(body):
    given = _field(body, "files", dict, {}, "an object of path: base64")
    if len(given) > MAX_FILES:
        raise RequestProblem("files", f"at most {MAX_FILES} files, got {len(given)}", 413)
    files = {}
    for name, content in given.items():
        if content is None or _SKIPPED_NAME in name:
            continue
        try:
            files[name] = base64.b64decode(content, validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise RequestProblem("files", f"the content of {name[:80]!r} is not base64") from None
    try:
        check_files(files)
    except ValueError as error:
        raise RequestProblem("files", str(error)) from None
    return files


def _fetch(body):
    names = _field(body, "fetch_files", list, [], "a list of paths")
    try:
        return [check_name(name) for name in names[:MAX_FILES]]
    except ValueError as error:
        raise RequestProblem("fetch_files", str(error)) from None


def to_wire(result):
    """The response to a request that was served."""
    run = {
        "status": "Finished",
        "execution_time": result.duration_s,
        "return_code": result.return_code,
        "stdout": result.stdout,
        "stderr": result.stderr,
        "outcome": result.outcome,
        "detail": result.detail,
    }
    status, message = "Failed", ""
    if result.outcome == "ok":
        status = "Success"
    elif result.outcome == "infra_error":
        status, message = "SandboxError", result.detail or "the sandbox failed"
        run |= {"status": "Error", "stderr": message}
    elif result.outcome == "timeout":
        run["status"] = "TimeLimitExceeded"
    elif result.return_code is None:
        run["return_code"] = -9  # we ended it, and "Finished" needs a number
    files = {name: base64.b64encode(data).decode() for name, data in result.files.items()}
    return {
        "status": status,
        "message": message,
        "compile_result": None,
        "run_result": run,
        "executor_pod_name": None,
        "files": files,
    }


def not_served(message):
    """The response for a request that is well formed but not for this server."""
    return to_wire(infra_error(message))


def from_wire(body, timeout_s):
    """SandboxResult of a response; whatever is not a clear answer becomes an infra_error."""
    run = body.get("run_result") if isinstance(body, dict) else None
    if not isinstance(run, dict) or body.get("status") not in ("Success", "Failed"):
        message = body.get("message") if isinstance(body, dict) else None
        return infra_error(f"the service failed: {message or 'no run_result in its answer'}")
    code = run.get("return_code")
    outcome, status = run.get("outcome"), FINISHED
    if outcome not in OUTCOMES:
        outcome = None
    if run.get("status") == "TimeLimitExceeded":
        outcome, status, code = "timeout", STOPPED, None
    elif run.get("status") != "Finished" or not isinstance(code, int):
        return infra_error(f"the service reported {run.get('status')!r} without an exit code")
    elif outcome is None:
        outcome = "ok" if code == 0 else "user_error"
    elif outcome == "rejected":
        status = NOT_RUN
    elif run.get("detail"):
        status, code = STOPPED, None
    out, err = (run.get(name) or "" for name in ("stdout", "stderr"))
    files = {name: base64.b64decode(data) for name, data in (body.get("files") or {}).items()}
    return SandboxResult(
        status,
        outcome,
        code,
        out,
        err,
        run.get("execution_time") or 0.0,
        run.get("detail") or "",
        len(out.encode("utf-8", "replace")),
        len(err.encode("utf-8", "replace")),
        files,
        timeout_s,
    )
