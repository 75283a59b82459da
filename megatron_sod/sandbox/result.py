"""What a run gives back, and how its outcome is decided: from status and exit code, never text."""

import dataclasses

from .observation import render_observation

OUTCOMES = ("ok", "user_error", "timeout", "memory", "output_limit", "infra_error", "rejected")
# How the run ended: by itself, stopped by us, or never started.
_OWN_FAULTS = {"scratch": "too many files or bytes on disk", "processes": "too many processes"}
FINISHED, STOPPED, NOT_RUN = "finished", "stopped", "not_run"


@dataclasses.dataclass(frozen=True)
class SandboxResult:
    """One program's end, e.g. SandboxResult("finished", "ok", 0, "120\\n", "", 0.006).

    status: "finished" | "stopped" (a limit was passed) | "not_run" (rejected, or our own failure).
    outcome: one of OUTCOMES. "infra_error" says nothing about the program and must never be
        trained on; every other outcome is the program's own.
    return_code: exit code; negative = the signal; None when it did not end by itself.
    stdout, stderr: what was kept (head and tail, 64 KiB each), UTF-8 with replacement.
    duration_s: wall seconds from the request to the end.
    detail: for people and logs: the reason of infra_error, rejected or stopped; else "".
    stdout_bytes, stderr_bytes: how much the program wrote, kept or not.
    files: contents of the files asked for, by name.
    """

    status: str
    outcome: str
    return_code: int | None
    stdout: str
    stderr: str
    duration_s: float
    detail: str = ""
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    files: dict = dataclasses.field(default_factory=dict)
    timeout_s: float = 0.0

    def observation_text(self, limit_chars=4096):
        """The deterministic text for the model; see observation.render_observation."""
        return render_observation(self, limit_chars)


def rejected(reason):
    """A program that is not run at all, for a fault of its own."""
    stderr = f"SyntaxError: {reason}\n"
    size = len(stderr)
    return SandboxResult(NOT_RUN, "rejected", 1, "", stderr, 0.0, reason, stderr_bytes=size)


def infra_error(reason, duration_s=0.0):
    """The sandbox failed, not the program. Its streams stay empty: nothing to mistake for output"""
    return SandboxResult(NOT_RUN, "infra_error", None, "", "", duration_s, reason)


def classify(report, stop_reason):
    """(status, outcome, return code, detail) of a program that ran.

    Args:
        report: the supervisor's report: exit, memory, stopped.
        stop_reason: "timeout" | "output_limit" | None, what this side asked to stop for.
    """
    if stop_reason is not None and report["stopped"] is not None:
        return STOPPED, stop_reason, None, stop_reason
    if report["stopped"] == "memory":
        return STOPPED, "memory", None, "the processes together passed the memory limit"
    if report["stopped"] in _OWN_FAULTS:
        return STOPPED, "user_error", None, _OWN_FAULTS[report["stopped"]]
    code = report["exit"]
    if code == 1 and report["memory"]:
        return FINISHED, "memory", code, ""
    return FINISHED, "ok" if code == 0 else "user_error", code, ""
