"""The embedded sandbox: runs programs in forks of an isolated guest process."""

import json
import os
import queue
import select
import socket
import threading
import time

from megatron_sod.errors import SandboxError

from . import result as results
from .capture import Stream
from .limits import check_concurrency
from .source import check_files, check_name, source_bytes
from .zygote import Zygote, memory_file

_STOP_PATIENCE_S = 8.0  # how long a stopped call may take to be gone before the guest is replaced
_CANCEL_TICK_S = 0.05


class LocalSandbox:
    """Use `open_sandbox`. Thread-safe: `run` may be called from many threads at the same time."""

    def __init__(self, config, limits, max_concurrency, echo, description):
        self.level = config["level"]
        self.limits = limits
        self.max_concurrency = check_concurrency(max_concurrency)
        self._echo = echo
        self._config = config
        self._description = description
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(self.max_concurrency):
            self._slots.put(slot)
        self._restart_lock = threading.Lock()
        self._closed = False
        self._zygote = Zygote(config, self.max_concurrency)
        self._zygote.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Ends every run and process; idempotent."""
        self._closed = True
        self._zygote.stop()

    def describe(self):
        """{level, mechanisms, limits, why higher levels were passed over}, for logs and metrics."""
        return dict(self._description)

    def run(self, code, stdin=None, *, limits=None, files=None, fetch=(), cancel=None, echo=None):
        """Runs one program in a place of its own, of which nothing survives.

        Args:
            code: the program, str. stdin: str or bytes; None or empty = end of file at once.
            limits: Limits for this run only. files: {relative path: bytes} put there before.
            fetch: relative paths read back after. cancel: threading.Event that stops the run.
            echo: print the value of a last expression; default: as the sandbox was opened.
        Returns:
            SandboxResult. Never raises for what the program does, nor when the sandbox fails
            (outcome "infra_error").
        Raises:
            TypeError, ValueError: code or stdin is not text, or a file name leaves the scratch.
        """
        limits = limits or self.limits
        source, reason = source_bytes(code)
        if reason is not None:
            return results.rejected(reason)
        echo = self._echo if echo is None else echo
        fetch = [check_name(name) for name in fetch]
        payload = _payload(source, limits, echo, check_files(files), fetch)
        stdin = stdin.encode("utf-8", "surrogateescape") if isinstance(stdin, str) else stdin
        slot = self._slots.get()
        try:
            for last_try in (False, True):
                run = _Run(limits, cancel)
                zygote = self._zygote
                outcome = run.execute(zygote, slot, payload, stdin or b"")
                if outcome.outcome != "infra_error" or last_try or self._closed:
                    return outcome
                # Replacing a healthy guest process would end the other runs.
                if run.is_guest_broken or (run.is_cut_off and zygote.is_dead()):
                    self._replace(zygote)
                elif not run.is_cut_off:
                    return outcome
        finally:
            self._slots.put(slot)

    def _replace(self, broken):
        """A new guest process for one that died or hangs; once, whoever notices first."""
        with self._restart_lock:
            if self._zygote is not broken or self._closed:
                return
            broken.stop()
            fresh = Zygote(self._config, self.max_concurrency)
            try:
                fresh.start()
            except SandboxError:
                return  # the caller's second try reports it
            self._zygote = fresh


def _payload(source, limits, echo, files, fetch):
    header = {
        "source_bytes": len(source),
        "files": [(name, len(content)) for name, content in files],
        "limits": limits.for_guest(),
        "echo": echo,
        "fetch": fetch,
    }
    return b"".join([json.dumps(header).encode(), b"\n", source, *(c for _, c in files)])


class _Run:
    """One try of one program, driven by the calling thread."""

    def __init__(self, limits, cancel):
        self._limits = limits
        self._cancel = cancel
        self._started_at = time.monotonic()
        self.is_guest_broken = False  # it does not take a call, or does not end one
        self.is_cut_off = False  # the call ended without a report

    def execute(self, zygote, slot, payload, stdin):
        """Runs to the end; every descriptor opened here is closed here."""
        opened = []
        try:
            opened += [memory_file(payload), memory_file(stdin), *os.pipe(), *os.pipe()]
            control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            payload_fd, stdin_fd, out_read, out_write, err_read, err_write = opened
            sent = (payload_fd, stdin_fd, out_write, err_write, theirs.fileno())
            try:
                with theirs:
                    zygote.spawn(slot, sent)
                for descriptor in (payload_fd, stdin_fd, out_write, err_write):
                    os.close(descriptor)
                    opened.remove(descriptor)
                return self._collect(control, out_read, err_read)
            finally:
                control.close()
        except OSError as error:
            self.is_guest_broken = isinstance(error, BrokenPipeError | ConnectionResetError)
            return results.infra_error(f"cannot start a run: {error}", self._elapsed())
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def _elapsed(self):
        return time.monotonic() - self._started_at

    def _collect(self, control, out_read, err_read):
        """Drains both streams until the supervisor has reported: by then every writer is dead, so
        what is in the pipes is all there is. (Waiting for their end of file instead would hang
        when a fork of this process holds a copy.)"""
        streams = {fd: Stream(self._limits.output_bytes) for fd in (out_read, err_read)}
        poller = select.poll()
        for descriptor in (*streams, control.fileno()):
            poller.register(descriptor, select.POLLIN)
        deadline = self._started_at + self._limits.timeout_s
        report, stop_reason, fetched, is_over = None, None, {}, False
        while True:
            now = time.monotonic()
            reason = self._reason_to_stop(streams, now >= deadline)
            if reason and stop_reason is None and not is_over:
                stop_reason, deadline = reason, now + _STOP_PATIENCE_S
                _ask_to_stop(control)
            elif now >= deadline and not is_over:
                self.is_guest_broken = True
                break
            events = poller.poll(0 if is_over else self._wait_ms(deadline - now))
            if is_over and not events:
                break
            for descriptor, _event in events:
                if descriptor not in streams:
                    report, fetched = _read_report(control)
                    is_over = True
                    poller.unregister(control)
                elif not _take(descriptor, streams[descriptor]):
                    poller.unregister(descriptor)
            if is_over and now >= deadline:
                break
        return self._result(report, stop_reason, streams[out_read], streams[err_read], fetched)

    def _wait_ms(self, left_s):
        return 1000 * min(max(left_s, 0.0), left_s if self._cancel is None else _CANCEL_TICK_S) + 1

    def _reason_to_stop(self, streams, is_late):
        if is_late:
            return "timeout"
        if self._cancel is not None and self._cancel.is_set():
            return "cancelled"
        return "output_limit" if any(map(self._is_flood, streams.values())) else None

    def _is_flood(self, stream):
        return stream.num_bytes > self._limits.output_stop_bytes

    def _result(self, report, stop_reason, out, err, fetched):
        elapsed = self._elapsed()
        if report is None:
            self.is_cut_off = not self.is_guest_broken
            reason = "its supervisor died" if self.is_cut_off else "it did not end when stopped"
            return results.infra_error(reason, elapsed)
        if "infra" in report:
            last_words = err.text().strip()[-300:]
            detail = report["infra"] + (f": {last_words}" if last_words else "")
            return results.infra_error(detail, elapsed)
        if stop_reason == "cancelled" and report["stopped"] is not None:
            return results.infra_error("cancelled", elapsed)
        status, outcome, code, detail = results.classify(report, stop_reason)
        return results.SandboxResult(
            status,
            outcome,
            code,
            out.text(),
            err.text(),
            elapsed,
            detail,
            out.num_bytes,
            err.num_bytes,
            fetched,
            self._limits.timeout_s,
        )


def _ask_to_stop(control):
    try:
        control.send(b"stop")
    except OSError:
        pass  # it ended meanwhile; its report is in the socket


def _take(descriptor, stream):
    """Reads what is there. Returns False at the end of file."""
    data = os.read(descriptor, 1 << 18)
    if data:
        stream.add(data)
    return bool(data)


def _read_report(control):
    """(report or None when the supervisor died without one, fetched files)."""
    try:
        data, descriptors, _, _ = socket.recv_fds(control, 65536, 1)
    except ConnectionResetError:  # it had ended before it read our order; the report comes second
        data, descriptors, _, _ = socket.recv_fds(control, 65536, 1)
    except OSError:
        return None, {}
    if not data:
        return None, {}
    files = {}
    for descriptor in descriptors:
        with open(descriptor, "rb") as file:
            file.seek(0)
            files = {name: file.read(size) for name, size in json.loads(file.readline())}
    return json.loads(data), files
