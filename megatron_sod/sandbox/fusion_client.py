"""A SandboxFusion service as a sandbox: the same `run`, over HTTP.

A failure of the service never looks like an answer of the program: it is retried, and what
persists becomes the outcome "infra_error", which has no text for the model.
"""

import base64
import http.client
import json
import os
import random
import threading
import time
import urllib.parse

from megatron_sod.errors import SandboxError

from . import result as results
from .protocol import from_wire
from .source import check_files, source_bytes

_RETRIED = frozenset({429, 500, 502, 503, 504})
_MAX_ANSWER_BYTES = 64 << 20
_COOL_DOWN_S = (0.5, 30.0)  # how long a failing address is avoided: first time, at most


class _Failure(Exception):
    """A try that gave no answer. `wait_s`: what the service asked for, or None."""

    def __init__(self, reason, is_final=False, wait_s=None):
        super().__init__(reason)
        self.is_final = is_final
        self.wait_s = wait_s


class _Address:
    """One service address and its health."""

    def __init__(self, url):
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SandboxError(f"sandbox url {url!r} must be http(s)://host[:port][/run_code]")
        self.url = url
        self.is_https = parts.scheme == "https"
        self.host, self.port = parts.hostname, parts.port
        path = parts.path.rstrip("/")
        self.path = path if path.endswith("/run_code") else path + "/run_code"
        self.num_running = self.num_failures = 0
        self.avoided_until = 0.0

    def succeeded(self):
        self.num_failures = 0
        self.avoided_until = 0.0

    def failed(self):
        self.num_failures += 1
        first, longest = _COOL_DOWN_S
        wait_s = min(longest, first * 2 ** min(self.num_failures - 1, 10))
        self.avoided_until = time.monotonic() + wait_s


class FusionClient:
    """Runs programs on one or several SandboxFusion-compatible services. Thread-safe.

    Args:
        urls: addresses, with or without /run_code. timeout_s, memory_mb: of one run.
        max_concurrency: requests at the same time, per address; more wait.
        max_tries: per run, over all addresses. deadline_s: per run, tries and pauses together.
        token: sent as a bearer token; default: the environment's SOD_SANDBOX_TOKEN.
        echo: ask for the value of a last expression (our server knows it, others ignore it).
    Raises:
        SandboxError: no address, or one that is none.
    """

    level = "service"

    def __init__(
        self,
        urls,
        timeout_s=10,
        memory_mb=2048,
        max_concurrency=32,
        max_tries=4,
        deadline_s=None,
        token=None,
        echo=True,
    ):
        urls = [urls] if isinstance(urls, str) else list(urls)
        if not urls:
            raise SandboxError("sandbox.kind=sandbox_fusion needs at least one sandbox.url")
        self._addresses = [_Address(url) for url in urls]
        self._timeout_s, self._memory_mb, self._echo = timeout_s, memory_mb, echo
        self._max_tries = max_tries
        self._deadline_s = deadline_s or 2 * timeout_s + 120
        self._token = token or os.environ.get("SOD_SANDBOX_TOKEN")
        self._free = threading.BoundedSemaphore(max_concurrency * len(urls))
        self._lock = threading.Lock()
        self._counts = {"runs": 0, "retries": 0, "infra_errors": 0}
        self._random = random.Random()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Nothing is kept open between runs."""

    def describe(self):
        """{level, urls, how many runs, retries and infra_errors so far}."""
        return {"level": self.level, "urls": [a.url for a in self._addresses], **self._counts}

    def run(self, code, stdin=None, *, files=None, fetch=()):
        """As LocalSandbox.run. Every failure of the service is an "infra_error" result."""
        _, reason = source_bytes(code)
        if reason is not None:
            return results.rejected(reason)
        request = json.dumps(self._request(code, stdin, files, fetch)).encode()
        self._count("runs")
        with self._free:
            started_at = time.monotonic()
            answer = self._try(request, started_at + self._deadline_s)
        if answer.outcome == "infra_error":
            self._count("infra_errors")
        return answer

    def _request(self, code, stdin, files, fetch):
        if isinstance(stdin, bytes):
            stdin = stdin.decode("utf-8")
        return {
            "compile_timeout": self._timeout_s,
            "run_timeout": self._timeout_s,
            "code": code,
            "stdin": stdin,
            "memory_limit_MB": self._memory_mb,
            "language": "python",
            "files": {n: base64.b64encode(c).decode() for n, c in check_files(files)},
            "fetch_files": list(fetch),
            "echo": self._echo,
        }

    def _try(self, request, deadline):
        """The first clear answer within the tries and the deadline, else an infra_error."""
        reason = "no try was made"
        for number in range(self._max_tries):
            address = self._choose()
            try:
                answer = self._post(address, request, deadline)
                address.succeeded()
                return from_wire(answer, self._timeout_s)
            except _Failure as failure:
                reason = f"{address.url}: {failure}"
                if failure.is_final:
                    break
                if failure.wait_s is None:  # busy is not broken
                    address.failed()
                pause_s = failure.wait_s or min(8.0, 0.25 * 2**number)
                pause_s *= self._random.uniform(0.5, 1.5)  # or all clients come back at once
                is_last = number == self._max_tries - 1
                if is_last or time.monotonic() + pause_s > deadline:
                    break
                self._count("retries")
                time.sleep(pause_s)
            finally:
                with self._lock:
                    address.num_running -= 1
        return results.infra_error(reason)

    def _choose(self):
        """The healthy address with the fewest requests; when all fail, the one longest so."""
        now = time.monotonic()
        with self._lock:
            healthy = [a for a in self._addresses if a.avoided_until <= now]
            if healthy:
                address = min(healthy, key=lambda a: (a.num_running, self._random.random()))
            else:
                address = min(self._addresses, key=lambda a: a.avoided_until)
            address.num_running += 1
            return address

    def _post(self, address, request, deadline):
        """The decoded body of a 200 answer. Redirects are not followed: a service that moved is
        a configuration to correct, and the program must not travel to a third party."""
        kind = http.client.HTTPSConnection if address.is_https else http.client.HTTPConnection
        timeout_s = max(1.0, min(self._timeout_s + 60, deadline - time.monotonic()))
        connection = kind(address.host, address.port, timeout=timeout_s)
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            connection.request("POST", address.path, request, headers)
            response = connection.getresponse()
            body = response.read(_MAX_ANSWER_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            raise _Failure(f"{type(error).__name__}: {error}") from None
        finally:
            connection.close()
        if response.status != 200:
            text = body[:200].decode("utf-8", "replace")
            wait_s = _seconds(response.getheader("Retry-After"))
            is_final = response.status not in _RETRIED
            raise _Failure(f"HTTP {response.status}: {text}", is_final, wait_s)
        try:
            return json.loads(body)
        except ValueError:
            raise _Failure("the answer is not JSON or too long", is_final=True) from None

    def _count(self, name):
        with self._lock:
            self._counts[name] += 1


def _seconds(header):
    """Retry-After in seconds, at most 30; None when absent or a date."""
    try:
        return min(30.0, max(0.0, float(header)))
    except (TypeError, ValueError):
        return None
