"""Rows of the doctor that need no such machine. Layer: pure."""

import socket
from types import SimpleNamespace

from megatron_sod.observe import doctor


def test_a_port_in_use_is_shown_with_what_to_do(monkeypatch):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        monkeypatch.setenv("RAY_PORT", str(holder.getsockname()[1]))
        _, row = doctor._ports()
    assert row.state == "missing" and "RAY_PORT" in row.remedy and not row.is_required
    assert doctor._port("Ray", "RAY_PORT", 0).state == "ok"  # closed again


def test_links_are_counted_until_a_gpu_has_no_more():
    class Error(Exception):
        pass

    def state(handle, link):
        if link >= 3:
            raise Error
        return 1 if link < 2 else 0

    nvml = SimpleNamespace(
        NVMLError=Error, nvmlDeviceGetHandleByIndex=int, nvmlDeviceGetNvLinkState=state
    )
    assert doctor._num_links(nvml, 0) == 2
    assert doctor._link_row(8, 16).state == "ok" and doctor._link_row(1, 0).state == "ok"
    assert "PCIe" in doctor._link_row(8, 0).remedy
