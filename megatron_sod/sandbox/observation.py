"""The text a model gets to read after a call: the same bytes for the same program, always.

No wall time, temporary name or address of ours may appear, or the same call gives the student and
the teacher different tokens. Truncation by tokens is the agent loop's own second step.
"""

import re

EMPTY = "[no output]"
# CSI and OSC sequences first, then what is left of C0, DEL and C1 except newline and tab.
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SCRATCH = re.compile(r"(?:/sandbox|/[^\s\"']*/sod-sandbox-[^/\s\"']+/\d+)/(?=[^\s/])")


def clean(text):
    """Newlines normalised, terminal sequences and control characters gone, scratch paths cut."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _CONTROLS.sub("", _ESCAPES.sub("", text))
    text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate becomes "?"
    return _SCRATCH.sub("", text)


def shorten(text, limit_chars):
    """At most `limit_chars` characters: the head and the tail, with what is missing named."""
    if len(text) <= limit_chars:
        return text
    mark = f"\n[... {len(text) - limit_chars} characters left out ...]\n"
    room = limit_chars - len(mark)
    if room < 2:
        return text[:limit_chars]
    head = room // 2
    return text[:head] + mark + text[len(text) - (room - head) :]


def _last_lines(text, num_lines=20):
    """The end of a traceback: its last lines say what went wrong, the first only where from."""
    lines = text.rstrip("\n").split("\n")
    if len(lines) <= num_lines:
        return "\n".join(lines)
    return "\n".join([f"[... {len(lines) - num_lines} lines left out ...]", *lines[-num_lines:]])


def _notice(result):
    if result.outcome == "timeout":
        return f"Execution timed out after {result.timeout_s:g} seconds"
    if result.outcome == "memory":
        return "Execution stopped: out of memory"
    if result.outcome == "output_limit":
        return "Execution stopped: too much output"
    if result.status == "stopped":
        return f"Execution stopped: {result.detail}"
    if result.outcome == "user_error" and not result.stderr.strip():
        return f"Exit code {result.return_code}"
    return ""


def render_observation(result, limit_chars=4096):
    """What the program printed, its error if any, and why it was stopped if it was.

    Args:
        result: SandboxResult of a run that says something about the program.
        limit_chars: characters, >= 64; head and tail are kept.
    Raises:
        ValueError: the result is an infra_error: there is nothing a model may read about it.
    """
    if result.outcome == "infra_error":
        raise ValueError(
            f"an infra_error has no observation ({result.detail}); retry the call or drop the "
            "trajectory from every loss"
        )
    if limit_chars < 64:
        raise ValueError(f"limit_chars is {limit_chars}; at least 64 are needed for head and tail")
    parts = [clean(result.stdout).strip("\n"), _last_lines(clean(result.stderr)), _notice(result)]
    text = "\n".join(part for part in parts if part)
    return shorten(text, limit_chars) or EMPTY
