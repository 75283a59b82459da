"""A SandboxFusion-compatible service in this process, over the real sandbox; fails on demand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from megatron_sod.sandbox import open_sandbox
from megatron_sod.sandbox.protocol import to_wire

Fault = Callable[[str], str | None]  # program -> "down" | "hang" | what to print instead | None


class FlakyService:
    """Runs programs, except those `fault` singles out."""

    def __init__(self, *, hang_s: float = 60.0):
        self.fault: Fault = lambda code: None
        self.programs: Counter[str] = Counter()
        self._hang_s = hang_s
        self._sandbox = open_sandbox(level="auto", timeout_s=5, memory_mb=512, max_concurrency=2)
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._answer(*service._serve(body["code"]))

            def _answer(self, status: int, body: dict):
                payload = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                if status != 200:
                    self.send_header("Retry-After", "0.01")
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # a client that gave up waiting
                    self.wfile.write(payload)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _serve(self, code: str) -> tuple[int, dict]:
        self.programs[code] += 1
        fault = self.fault(code)
        if fault == "down":
            return 503, {"message": "the test says so"}
        if fault == "hang":
            time.sleep(self._hang_s)
            return 503, {"message": "too late"}
        if fault is not None:
            code = f"print({fault!r})" if len(fault) < 1000 else f"print('x' * {len(fault)})"
        return 200, to_wire(self._sandbox.run(code))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._sandbox.close()


def share(code: str, fraction: float) -> bool:
    """Whether a program belongs to a share of all programs; the same answer every time."""
    digest = hashlib.sha256(code.encode()).digest()
    return int.from_bytes(digest[:4], "little") < fraction * 2**32
