"""Whether two mathematical answers are equal, decided by math-verify in a process of its own.

A student may write `9^{9^{9^{9}}}`; evaluating it takes for ever inside one C call, which no
timeout in Python can stop. So a helper process does it, under an alarm that ends the process.

python -m megatron_sod.rollout.math_check 5      the helper: JSON lines in, "1" or "0" lines out
"""

from __future__ import annotations

import atexit
import json
import logging
import signal
import subprocess
import sys
import threading

from megatron_sod.errors import GraderUnavailable

_KILLED = (-signal.SIGKILL, -signal.SIGTERM)
MAX_CHARACTERS = 1000  # of an answer; longer ones are compared as text only


class MathChecker:
    """Asks the helper, one question at a time; starts it when needed."""

    def __init__(self, timeout_s: float = 5.0) -> None:
        """`timeout_s`: for one answer; one that takes longer is wrong."""
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._helper: subprocess.Popen | None = None

    def equal(self, reference: str, given: str) -> bool:
        """Whether `given` equals `reference`; False when that cannot be decided in time.

        Raises:
            GraderUnavailable: the helper was killed from outside, again after a new start.
        """
        if max(len(reference), len(given)) > MAX_CHARACTERS:
            return False
        for _ in range(2):
            with self._lock:
                answer, code = self._ask(json.dumps([reference, given]))
            if answer or code not in _KILLED:  # the alarm, or a crash on what the student wrote
                return answer == "1"
        raise GraderUnavailable(f"the math checker was killed twice (exit code {code})")

    def _ask(self, question: str) -> tuple[str, int]:
        """The answer, or "" and how the helper ended."""
        helper = self._running()
        assert helper.stdin is not None and helper.stdout is not None
        try:
            helper.stdin.write(question + "\n")
            helper.stdin.flush()
            answer = helper.stdout.readline().strip()
        except BrokenPipeError:
            answer = ""
        code = 0
        if not answer:
            code = helper.wait()
            self._end()
        return answer, code

    def _running(self) -> subprocess.Popen:
        if self._helper is None or self._helper.poll() is not None:
            self._end()
            self._helper = subprocess.Popen(
                [sys.executable, "-m", __name__, str(self._timeout_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            atexit.register(self._end)
        return self._helper

    def _end(self) -> None:
        if self._helper is not None:
            self._helper.kill()
            self._helper.communicate()
            self._helper = None


def _serve(timeout_s: float) -> None:
    logging.disable(logging.CRITICAL)  # its warnings that timeouts are off
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it is inside of
    from megatron_sod.rollout.math_equal import equal  # seconds, outside the time limit

    equal("1", "1")
    for line in sys.stdin:
        reference, given = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            is_equal = equal(reference, given)
        except Exception:  # whatever a student's text makes sympy raise
            is_equal = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(int(is_equal), flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
