"""The service as its users run it: a process of its own, real HTTP on loopback.

The PyPI client (sandbox-fusion) is used unchanged where it is installed; verl's payload is sent
verbatim; hostile requests get an answer and the service goes on serving.
"""

import base64
import concurrent.futures
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from megatron_sod.sandbox.fusion_client import FusionClient
from megatron_sod.sandbox.guest.processes import descendants

pytest.importorskip("aiohttp")
TOOL = os.path.join(os.path.dirname(__file__), "..", "..", "tools", "sandbox_server.py")
VERL = {
    "compile_timeout": 30,
    "run_timeout": 30,
    "code": "print(input())",
    "stdin": "7",
    "memory_limit_MB": 1024,
    "language": "python",
    "files": {},
    "fetch_files": [],
}


class Server:
    """The tool in a process; `post` talks to it without any client library."""

    def __init__(self, *options, token=None):
        environment = {k: v for k, v in os.environ.items() if k != "SOD_SANDBOX_TOKEN"}
        environment.update({"SOD_SANDBOX_TOKEN": token} if token else {})
        self.process = subprocess.Popen(
            [sys.executable, TOOL, "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        line = self.process.stdout.readline()
        if not line:
            pytest.skip(self.process.communicate()[1].strip()[-500:])
        self.port = int(line.rsplit(":", 1)[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def post(self, body, path="/run_code", headers=None, method="POST"):
        """(status, decoded body or text, headers)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data, headers or {})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        try:
            return response.status, json.loads(text), response.headers
        except ValueError:
            return response.status, text, response.headers

    def run(self, code, **fields):
        return self.post({"code": code, "language": "python", **fields})[1]

    def wait_for_runs(self, count, deadline_s=10):
        """Whether the number of running programs became `count`."""
        deadline = time.monotonic() + deadline_s
        while time.monotonic() < deadline:
            if self.post(None, "/health", method="GET")[1]["running"] == count:
                return True
            time.sleep(0.05)
        return False

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
        self.process.communicate(timeout=20)


@pytest.fixture(scope="module")
def server():
    running = Server("--max-concurrency", "4")
    yield running
    running.stop()


def test_verl_payload(server):
    status, body, _ = server.post(VERL)
    assert status == 200 and body["status"] == "Success" and body["message"] == ""
    assert body["compile_result"] is None and body["executor_pod_name"] is None
    run = body["run_result"]
    assert (run["status"], run["return_code"], run["stdout"]) == ("Finished", 0, "7\n")
    assert run["stderr"] == "" and run["execution_time"] > 0


def test_pypi_client_works_unchanged(server):
    fusion = pytest.importorskip("sandbox_fusion")
    fusion.set_endpoint(server.url)
    request = fusion.RunCodeRequest(
        code="print(open('a').read())\nopen('b','w').write('out')",
        language="python",
        files={"a": base64.b64encode(b"in").decode()},
        fetch_files=["b", "missing"],
    )
    answer = fusion.run_code(request)
    assert answer.status == fusion.RunStatus.Success
    assert answer.run_result.stdout == "in\n"
    assert answer.files == {"b": base64.b64encode(b"out").decode()}
    failed = fusion.run_code(fusion.RunCodeRequest(code="1/0", language="python"))
    assert failed.status == fusion.RunStatus.Failed and failed.run_result.return_code == 1
    slow = fusion.RunCodeRequest(code="while True: pass", language="python", run_timeout=0.5)
    assert fusion.run_code(slow).run_result.status == "TimeLimitExceeded"
    with pytest.raises(Exception, match="not served"):
        fusion.run_code(fusion.RunCodeRequest(code="x", language="cpp"), max_attempts=1)


def test_ping_and_health(server):
    assert server.post(None, "/v1/ping", method="GET")[:2] == (200, "pong")
    assert server.post(None, "/health", method="GET")[1]["level"] in ("L3", "L2", "L1")


@pytest.mark.parametrize(
    ("code", "status", "run_status", "return_code"),
    [
        ("print(1)", "Success", "Finished", 0),
        ("import sys; sys.exit(3)", "Failed", "Finished", 3),
        ("import os; os.abort()", "Failed", "Finished", -6),
        ("print('Hello'", "Failed", "Finished", 1),
        ("import time; time.sleep(9)", "Failed", "TimeLimitExceeded", None),
        ("print(1)\0", "Failed", "Finished", 1),
    ],
)
def test_status_words(code, status, run_status, return_code, server):
    body = server.run(code, run_timeout=1, stdin="y" * 6000)
    run = body["run_result"]
    assert (body["status"], run["status"], run["return_code"]) == (status, run_status, return_code)


def test_echo_only_when_asked_for(server):
    assert server.run("5")["run_result"]["stdout"] == ""
    assert server.run("5", echo=True)["run_result"]["stdout"] == "5\n"


def test_own_client_sees_what_the_sandbox_saw(server):
    client = FusionClient(server.url, timeout_s=1, memory_mb=256)
    programs = {
        "5": "ok",
        "1/0": "user_error",
        "while 1: pass": "timeout",
        "x = bytearray(1 << 40)": "memory",
        "while 1: print('x' * 99999)": "output_limit",
        "print(1)\0": "rejected",
    }
    assert {p: client.run(p).outcome for p in programs} == programs
    assert client.run("5").stdout == "5\n"


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        (b"", 400, "JSON"),
        (b'{"code": "1", "lang', 400, "JSON"),
        (b"[" * 200000, 400, "JSON"),
        ([], 422, "object"),
        ({}, 422, "code"),
        ({"code": "1"}, 422, "language"),
        ({"language": "python"}, 422, "code"),
        ({"code": None, "language": "python"}, 422, "code"),
        ({"code": "1", "language": "cobol"}, 422, "language"),
        *(
            ({"code": "1", "language": "python", "run_timeout": value}, 422, "at most 300")
            for value in (0, -1, float("nan"), 1e9)
        ),
        ({"code": "1", "language": "python", "run_timeout": "5"}, 422, "run_timeout"),
        ({"code": "1", "language": "python", "memory_limit_MB": 10**9}, 422, "at most 2048"),
        ({"code": "1", "language": "python", "stdin": 5}, 422, "stdin"),
        ({"code": "1", "language": "python", "files": []}, 422, "files"),
        ({"code": "1", "language": "python", "files": {"a": "%"}}, 422, "base64"),
        ({"code": "1", "language": "python", "files": {"a": 5}}, 422, "base64"),
        *(
            ({"code": "1", "language": "python", "files": {name: ""}}, 422, "file name")
            for name in ("../../etc/cron.d/x", "/etc/passwd", "a/../../b", "", ".", "n" * 300)
        ),
        ({"code": "1", "language": "python", "files": {"a": "", "a/b": ""}}, 422, "directory"),
        (
            {"code": "1", "language": "python", "files": {f"f{i}": "" for i in range(10000)}},
            413,
            "1000",
        ),
        ({"code": "1", "language": "python", "fetch_files": ["/etc/passwd"]}, 422, "file name"),
    ],
)
def test_bad_request_is_refused_with_its_field(body, status, named, server):
    answer = server.post(body)
    assert answer[0] == status and named in json.dumps(answer[1])
    assert server.run("print(1)")["run_result"]["stdout"] == "1\n"


def test_null_and_marked_files_are_skipped(server):
    files = {"a": None, "IGNORE_THIS_FILE_b": "%"}
    body = server.run("import os; print(os.listdir('.'))", files=files)
    assert body["run_result"]["stdout"] == "['main.py']\n"


def test_other_language_and_impossible_memory_are_sandbox_errors(server):
    body = server.post({"code": "x", "language": "cpp"})[1]
    assert body["status"] == "SandboxError" and "cpp is not served" in body["message"]
    body = server.run("1", memory_limit_MB=1)
    assert body["status"] == "SandboxError" and "memory_mb is 1" in body["message"]


def test_body_above_16_mb_is_refused(server):
    assert server.post({"code": "#" * (17 << 20), "language": "python"})[0] == 413


def test_large_stdin_to_a_program_that_ends_at_once(server):
    assert server.run("print(1)", stdin="s" * (8 << 20))["status"] == "Success"


def test_execute_dialect(server):
    answer = server.post({"code": "print(1)", "language": "python"}, "/execute")
    assert answer[:2] == (200, {"stdout": "1\n", "stderr": "", "returncode": 0})
    body = {"code": "while 1: pass", "run_timeout": 0.5}
    assert server.post(body, "/execute")[:2] == (408, {"error": "Timeout"})


def test_program_ends_when_its_client_goes_away(server):
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        body = json.dumps({"code": "import time; time.sleep(60)", "language": "python"})
        head = f"POST /run_code HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall((head + body).encode())
        assert server.wait_for_runs(1)
    gone_at = time.monotonic()
    assert server.wait_for_runs(0)
    assert time.monotonic() - gone_at < 3


def test_flood_is_answered_and_bounded():
    server = Server("--max-concurrency", "2", "--max-waiting", "3")
    try:
        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            body = {"code": "import time; time.sleep(1)", "language": "python"}
            answers = list(pool.map(lambda _: server.post(body), range(40)))
        statuses = [status for status, _, _ in answers]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 5
        refused = [headers for status, _, headers in answers if status == 429]
        assert all(int(headers["Retry-After"]) >= 1 for headers in refused)
        assert server.run("print(1)")["status"] == "Success"
    finally:
        server.stop()


def test_token_is_needed_and_checked():
    server = Server(token="right")
    try:
        body = {"code": "print(1)", "language": "python"}
        assert server.post(body)[0] == 401
        assert server.post(body, headers={"Authorization": "Bearer wrong"})[0] == 401
        assert server.post(body, headers={"Authorization": "Bearer right"})[0] == 200
        assert FusionClient(server.url, token="right").run("5").stdout == "5\n"
        assert FusionClient(server.url, token="wrong").run("5").outcome == "infra_error"
    finally:
        server.stop()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_addresses_need_a_token(host):
    environment = {k: v for k, v in os.environ.items() if k != "SOD_SANDBOX_TOKEN"}
    command = [sys.executable, TOOL, "--host", host, "--port", "0"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert run.returncode == 1 and "SOD_SANDBOX_TOKEN" in run.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopping_leaves_no_process(number):
    server = Server()
    pids = []
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        request = pool.submit(server.run, "import time; time.sleep(60)", run_timeout=60)
        assert server.wait_for_runs(1)
        time.sleep(0.3)
        pids = descendants(server.process.pid)
        assert len(pids) >= 3
        server.process.send_signal(number)
        started_at = time.monotonic()
        server.process.wait(10)
        assert number == signal.SIGKILL or time.monotonic() - started_at < 5
        deadline = time.monotonic() + 10
        while any(os.path.exists(f"/proc/{p}") for p in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [p for p in pids if os.path.exists(f"/proc/{p}")] == []
        assert request.exception() is not None or request.result() is not None
    server.stop()
