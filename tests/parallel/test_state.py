"""Starting and leaving the process groups where CUDA is.

Layers: pure, torch.cuda is told what to answer; one gloo rank. Real groups: the tests over gloo.
"""

import os
from pathlib import Path

import pytest
import torch

from megatron_sod.parallel import cpu, state
from tests.helpers.gloo import run_on_ranks


@pytest.mark.parametrize(
    ("on_gpu", "error", "is_left"),
    [(True, None, True), (True, ValueError(), False), (False, ValueError(), True)],
)
def test_after_an_error_on_a_gpu_the_groups_are_not_closed(monkeypatch, on_gpu, error, is_left):
    """Ranks that wait inside a collective would never come to close them."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(state, "shutdown", lambda: calls.append("shutdown"))
    state.shutdown_unless_failed(type(error), error, None)
    assert bool(calls) == is_left


def test_the_router_finds_the_name_that_transformer_engine_would_define(monkeypatch):
    from megatron.core.transformer.moe import moe_utils

    if getattr(moe_utils, "te_general_gemm", None) is not None:
        pytest.skip("Transformer-Engine is installed and defines it")
    monkeypatch.delattr(moe_utils, "te_general_gemm", raising=False)
    cpu.work_without_transformer_engine()
    assert moe_utils.te_general_gemm is None


@pytest.mark.dist
def test_gloo_ranks_see_no_gpu_where_the_machine_has_one(monkeypatch):
    """With one in sight, Megatron's groups would take `cuda:LOCAL_RANK` under a gloo backend."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    [(rank, fork_server)] = run_on_ranks(1, _visible_devices)
    assert rank == fork_server == ""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def _visible_devices() -> tuple[str, str]:
    start = Path(f"/proc/{os.getppid()}/environ").read_text().split("\0")
    of_server = dict(line.split("=", 1) for line in start if "=" in line)
    return os.environ["CUDA_VISIBLE_DEVICES"], of_server["CUDA_VISIBLE_DEVICES"]
