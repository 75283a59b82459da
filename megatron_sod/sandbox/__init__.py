"""Runs programs written by a model, isolated from this machine and from each other.

    with open_sandbox(level="auto", timeout_s=10, memory_mb=2048) as sandbox:
        result = sandbox.run("print(6 * 7)")
        result.outcome, result.stdout        # "ok", "42\\n"

Neither torch, Ray nor vLLM is needed. docs/sandbox.md has the levels and what each one promises.
"""

from .ladder import LEVELS, open_sandbox
from .limits import Limits
from .local import LocalSandbox
from .observation import render_observation
from .result import OUTCOMES, SandboxResult
from .selfcheck import selfcheck

__all__ = [
    "LEVELS",
    "OUTCOMES",
    "Limits",
    "LocalSandbox",
    "SandboxResult",
    "open_sandbox",
    "render_observation",
    "selfcheck",
]
