"""A SandboxFusion-compatible HTTP service over the embedded sandbox. Needs aiohttp.

POST /run_code   SandboxFusion's request and response
POST /execute    {code, language} -> {stdout, stderr, returncode}; 408 on timeout
GET  /v1/ping    "pong"
GET  /health     level, how many runs are running and waiting
"""

import asyncio
import concurrent.futures
import dataclasses
import hmac
import ipaddress
import json
import signal
import threading

from aiohttp import web

from megatron_sod.errors import SandboxError

from . import protocol

MAX_BODY_BYTES = 16 << 20
_RETRY_AFTER = {"Retry-After": "1"}


@dataclasses.dataclass
class ServerSettings:
    """num_waiting: requests that may wait for a free slot, the next gets 429;
    max_wait_s: how long one may wait before it gets 503."""

    host: str = "127.0.0.1"
    port: int = 8080
    token: str | None = None
    num_waiting: int = 256
    max_wait_s: float = 30.0
    max_timeout_s: float = 300.0


def check_address(settings):
    """Raises SandboxError when others could reach the service without a token."""
    try:
        is_loopback = ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        is_loopback = settings.host == "localhost"
    if not is_loopback and not settings.token:
        raise SandboxError(
            f"the service would listen on {settings.host} for everyone; set SOD_SANDBOX_TOKEN "
            "(clients send it as a bearer token) or bind 127.0.0.1"
        )


class SandboxServer:
    """The service's state; `application()` is what aiohttp serves."""

    def __init__(self, sandbox, settings):
        check_address(settings)
        self._sandbox, self._settings = sandbox, settings
        count = sandbox.max_concurrency
        self._threads = concurrent.futures.ThreadPoolExecutor(count, "sandbox")
        self._slots = asyncio.Semaphore(count)
        self._running = set()
        self._num_waiting = 0
        self._is_closing = False

    def application(self):
        """The aiohttp application, with its shutdown attached."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._guard])
        app.add_routes(
            [
                web.post("/run_code", self._run_code),
                web.post("/execute", self._execute),
                web.get("/v1/ping", self._ping),
                web.get("/health", self._health),
            ]
        )
        app.on_shutdown.append(self._shut_down)
        return app

    @web.middleware
    async def _guard(self, request, handler):
        if self._settings.token and request.path != "/v1/ping":
            given = request.headers.get("Authorization", "").encode("utf-8", "replace")
            if not hmac.compare_digest(given, f"Bearer {self._settings.token}".encode()):
                return web.json_response({"detail": "a bearer token is needed"}, status=401)
        try:
            return await handler(request)
        except protocol.RequestProblem as problem:
            return web.json_response(problem.body, status=problem.status)

    async def _ping(self, _request):
        return web.json_response("pong")

    async def _health(self, _request):
        counts = {"running": len(self._running), "waiting": self._num_waiting}
        return web.json_response({"level": self._sandbox.level, **counts})

    async def _run_code(self, request):
        checked = self._parse(await _json(request))
        if checked["language"] != "python":
            message = f"language {checked['language']} is not served here, only python"
            return web.json_response(protocol.not_served(message))
        try:
            limits = self._limits(checked)
        except SandboxError as error:
            return web.json_response(protocol.not_served(str(error)))
        result = await self._run(checked, limits)
        return web.json_response(protocol.to_wire(result))

    async def _execute(self, request):
        body = await _json(request)
        if isinstance(body, dict):
            body = {"language": "python", **body}
        checked = self._parse(body)
        if checked["language"] != "python":
            raise protocol.RequestProblem("language", "only python is served here")
        result = await self._run(checked, self._limits(checked))
        if result.outcome == "timeout":
            return web.json_response({"error": "Timeout"}, status=408)
        if result.outcome == "infra_error":
            return web.json_response({"error": result.detail}, status=503, headers=_RETRY_AFTER)
        code = -9 if result.return_code is None else result.return_code
        answer = {"stdout": result.stdout, "stderr": result.stderr, "returncode": code}
        return web.json_response(answer)

    def _parse(self, body):
        largest_mb = self._sandbox.limits.memory_mb
        return protocol.parse_request(body, self._settings.max_timeout_s, largest_mb)

    def _limits(self, checked):
        memory_mb = checked["memory_mb"] or self._sandbox.limits.memory_mb
        changes = {"timeout_s": checked["timeout_s"], "memory_mb": memory_mb}
        return dataclasses.replace(self._sandbox.limits, **changes)

    async def _run(self, checked, limits):
        """One run in a thread. A client that goes away cancels this, which stops the program."""
        await self._wait_for_slot()
        cancel = threading.Event()
        self._running.add(cancel)
        try:
            call = asyncio.get_running_loop().run_in_executor(
                self._threads, self._run_in_thread, checked, limits, cancel
            )
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            cancel.set()
            await asyncio.wait([call])
            raise
        finally:
            self._running.discard(cancel)
            self._slots.release()

    def _run_in_thread(self, checked, limits, cancel):
        return self._sandbox.run(
            checked["code"],
            checked["stdin"],
            limits=limits,
            files=checked["files"],
            fetch=checked["fetch"],
            cancel=cancel,
            echo=checked["echo"],
        )

    async def _wait_for_slot(self):
        if self._is_closing:
            raise web.HTTPServiceUnavailable(text="shutting down", headers=_RETRY_AFTER)
        if self._slots.locked() and self._num_waiting >= self._settings.num_waiting:
            raise web.HTTPTooManyRequests(text="too many requests wait", headers=_RETRY_AFTER)
        self._num_waiting += 1
        try:
            await asyncio.wait_for(self._slots.acquire(), self._settings.max_wait_s)
        except TimeoutError:
            text = f"no free slot within {self._settings.max_wait_s:g} s"
            raise web.HTTPServiceUnavailable(text=text, headers=_RETRY_AFTER) from None
        finally:
            self._num_waiting -= 1

    async def _shut_down(self, _app):
        self._is_closing = True
        for cancel in list(self._running):
            cancel.set()
        self._threads.shutdown(wait=False, cancel_futures=True)


async def _json(request):
    try:
        return json.loads(await request.read())
    except (ValueError, RecursionError):
        raise protocol.RequestProblem("", "the body is not JSON", 400) from None


def serve(sandbox, settings, on_ready=None):
    """Serves until SIGTERM or SIGINT; then stops accepting, ends the runs and returns.

    Args:
        sandbox: LocalSandbox; closed by the caller. on_ready: called with the bound port.
    """
    asyncio.run(_serve(sandbox, settings, on_ready))


async def _serve(sandbox, settings, on_ready):
    server = SandboxServer(sandbox, settings)
    # handler_cancellation: without it a program runs on after its client is gone.
    runner = web.AppRunner(
        server.application(), handler_cancellation=True, access_log=None, shutdown_timeout=3.0
    )
    await runner.setup()
    site = web.TCPSite(runner, settings.host, settings.port)
    await site.start()
    if on_ready is not None:
        on_ready(runner.addresses[0][1])
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await runner.cleanup()
