"""A worker's sandboxes: how many calls they take at a time, and that they end with it.

Layers: pure, over a service that answers only when all expected programs are there -> the local
sandbox. The worker as an actor: test_controller.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron_sod.rollout.tool_calls import ToolCall
from megatron_sod.rollout.worker import RolloutWorker
from megatron_sod.types import Prompt
from tests.helpers.tiny import sod_config

STUDENT = Path(__file__).resolve().parents[2] / "configs/demo/student"
FINISHED = {"status": "Finished", "execution_time": 0.1, "return_code": 0, "stdout": "4\n"}
OK = {"status": "Success", "message": "", "run_result": {**FINISHED, "stderr": ""}}


def _worker(**sandbox) -> RolloutWorker:
    return RolloutWorker(sod_config(STUDENT, STUDENT, sandbox=sandbox), [None])


@contextlib.contextmanager
def _services(count: int, together: int):
    """Addresses whose answers wait until `together` programs are there at the same time."""
    barrier = threading.Barrier(together)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            with contextlib.suppress(threading.BrokenBarrierError):
                barrier.wait(30)
            body = json.dumps(OK).encode() if not barrier.broken else b"too few came"
            self.send_response(200 if not barrier.broken else 400)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 128

    servers = [Server(("127.0.0.1", 0), Handler) for _ in range(count)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield [f"http://127.0.0.1:{server.server_port}" for server in servers]
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("num_addresses", "max_concurrency", "together"), [(1, 45, 45), (2, 65, 65), (2, None, 64)]
)
def test_a_service_gets_as_many_calls_at_a_time_as_configured(
    num_addresses, max_concurrency, together
):
    """Those the client keeps back beyond the interpreter's own bound would be booked as hangs."""
    with _services(num_addresses, together) as urls:
        worker = _worker(
            kind="sandbox_fusion", url=urls, max_concurrency=max_concurrency, max_infra_retries=0
        )
        call = ToolCall("code_interpreter", {"code": "print(4)"})

        async def all_at_once():
            calls = [worker._interpreter.call(call, call_id=str(i)) for i in range(together)]
            return await asyncio.gather(*calls)

        outcomes = [o.outcome for o in asyncio.run(all_at_once())]
        asyncio.run(worker.close())
    assert outcomes == ["ok"] * together


def test_a_closed_worker_leaves_no_sandbox(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    worker = _worker(level="L0", allow_unsafe=True, max_concurrency=1)
    tests = json.dumps({"inputs": ["2\n"], "outputs": ["4\n"]})
    turn = "```python\nprint(2 * int(input()))\n```"
    assert asyncio.run(worker._grade(Prompt("p", [1], tests, "taco"), turn)) == 1.0
    assert len(list(tmp_path.iterdir())) == 2, "of the tool and of the grader"
    asyncio.run(worker.close())
    assert list(tmp_path.iterdir()) == []
