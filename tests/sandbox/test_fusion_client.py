"""The client against services that fail in every way: retried where it helps, never an answer.

A scripted HTTP service on loopback answers each request with the next entry of its script.
"""

import http.server
import json
import threading
import time

import pytest

from megatron_sod.errors import SandboxError
from megatron_sod.sandbox.fusion_client import FusionClient
from tests.helpers.gloo import free_port

FINISHED = {"status": "Finished", "execution_time": 0.1, "return_code": 0, "stdout": "4\n"}
OK = {"status": "Success", "message": "", "run_result": {**FINISHED, "stderr": ""}}


class Service:
    """Answers from `script`: a dict = 200 with it as JSON, an int = that status, bytes = raw body,
    "hang" = no answer, "drop" = the connection closes. The last entry repeats."""

    def __init__(self, *script, headers=None):
        self.requests = []
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                index = min(len(service.requests), len(script) - 1)
                service.requests.append((self.path, dict(self.headers), body))
                service.answer(self, script[index], headers or {})

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.released = threading.Event()
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler, entry, headers):
        if entry == "hang":
            self.released.wait(20)
        if entry in ("hang", "drop"):
            handler.close_connection = True
            return
        status = entry if isinstance(entry, int) else 200
        body = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            handler.send_header(name, str(value))
        handler.end_headers()
        handler.wfile.write(body)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    real = time.sleep
    monkeypatch.setattr("megatron_sod.sandbox.fusion_client.time.sleep", lambda s: real(s / 50))


@pytest.mark.parametrize("failure", [429, 500, 502, 503, 504, "drop"])
def test_passing_failure_is_retried(failure):
    with Service(failure, failure, OK) as service:
        result = FusionClient(service.url).run("print(4)")
    assert (result.outcome, result.stdout, len(service.requests)) == ("ok", "4\n", 3)


@pytest.mark.parametrize("failure", [400, 401, 404, 413, 422, 301, b"not json"])
def test_refusal_is_not_retried(failure):
    with Service(failure, OK, headers={"Location": "http://127.0.0.1:9/"}) as service:
        result = FusionClient(service.url).run("print(4)")
    assert (result.outcome, len(service.requests)) == ("infra_error", 1)


@pytest.mark.parametrize(
    "run",
    [
        {**FINISHED, "return_code": 1, "stderr": "Traceback"},
        {**FINISHED, "status": "TimeLimitExceeded", "return_code": None},
    ],
)
def test_program_failure_is_an_answer_and_not_retried(run):
    with Service({"status": "Failed", "run_result": run}, OK) as service:
        result = FusionClient(service.url).run("1/0")
    assert result.outcome in ("user_error", "timeout") and len(service.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        503,
        "drop",
        {"status": "SandboxError", "message": "out of pods", "run_result": None},
        {"status": "Success", "run_result": None},
        {"status": "Success"},
        {},
        [],
        None,
        {"status": "Failed", "run_result": {**FINISHED, "return_code": None}},
        {"status": "Failed", "run_result": {**FINISHED, "status": "Error"}},
    ],
)
def test_persistent_failure_is_an_infra_error_without_any_text(answer):
    with Service(answer) as service:
        result = FusionClient(service.url, max_tries=2).run("print(4)")
    assert (result.outcome, result.return_code) == ("infra_error", None)
    assert (result.stdout, result.stderr) == ("", "") and result.detail
    with pytest.raises(ValueError):
        result.observation_text()


def test_null_streams_are_empty_text():
    run = {**FINISHED, "stdout": None, "stderr": None}
    with Service({"status": "Success", "run_result": run}) as service:
        result = FusionClient(service.url).run("pass")
    assert (result.outcome, result.stdout, result.stderr) == ("ok", "", "")


def test_hanging_service_ends_at_the_deadline():
    with Service("hang") as service:
        started_at = time.monotonic()
        result = FusionClient(service.url, deadline_s=1.0).run("print(4)")
    assert result.outcome == "infra_error" and time.monotonic() - started_at < 4


def test_dead_address_is_avoided_for_a_living_one():
    with Service(OK) as service:
        client = FusionClient([f"http://127.0.0.1:{free_port()}", service.url])
        results = [client.run("print(4)") for _ in range(10)]
    assert {r.outcome for r in results} == {"ok"}
    assert client.describe()["retries"] <= 2  # the dead one is asked again only after a pause


def test_requests_at_the_same_time_are_bounded():
    running, most, lock = 0, 0, threading.Lock()
    with Service(OK) as service:
        plain = service.answer

        def slow(*arguments):
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            threading.Event().wait(0.05)
            plain(*arguments)
            with lock:
                running -= 1

        service.answer = slow
        client = FusionClient(service.url, max_concurrency=3)
        threads = [threading.Thread(target=client.run, args=("1",)) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert 2 <= most <= 3


def test_request_is_the_protocols():
    with Service(OK) as service:
        client = FusionClient(service.url + "/run_code", 30, 1024, token="t0ken")
        client.run("print(4)", "in", files={"a": b"\x01"})
    path, headers, body = service.requests[0]
    assert path == "/run_code" and headers["Authorization"] == "Bearer t0ken"
    assert body == {
        "compile_timeout": 30,
        "run_timeout": 30,
        "code": "print(4)",
        "stdin": "in",
        "memory_limit_MB": 1024,
        "language": "python",
        "files": {"a": "AQ=="},
        "fetch_files": [],
        "echo": True,
    }


def test_impossible_program_never_leaves_this_machine():
    with Service(OK) as service:
        result = FusionClient(service.url).run("print(1)\0")
    assert result.outcome == "rejected" and service.requests == []


@pytest.mark.parametrize("urls", [[], "ftp://x", "http://", [""]])
def test_address_that_is_none_is_refused_at_setup(urls):
    with pytest.raises(SandboxError, match="url"):
        FusionClient(urls)
