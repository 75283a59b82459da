"""Starting and leaving the process groups where CUDA is.

Layer: pure; torch.cuda is told what to answer. Real groups: the tests over gloo.
"""

import pytest
import torch

from megatron_sod.parallel import cpu, state


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
