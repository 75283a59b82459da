"""The user's own check of the op: passes as installed, fails with a non-zero exit when it is wrong.

The comparison itself is tests/ops/test_divergence.py's; here it is the tool's verdict.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

from megatron_sod.ops import check, compiled, dispatch, torch_ops

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check_loss.py"


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("check_loss", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["check_loss.py", *arguments])
        return module.main()

    return run


@pytest.mark.parametrize("dtype", sorted(check.TOLERANCES))
@pytest.mark.parametrize("shards", ["1", "3"])
def test_every_installed_implementation_passes(tool, capsys, dtype, shards):
    code = tool(
        *("--vocab-size", "1000", "--dtype", dtype, "--temperature", "0.8"),
        *("--tensor-model-parallel-size", shards),
    )
    printed = capsys.readouterr().out
    assert code == 0, printed
    for name in dispatch.installed_implementations("cpu"):
        assert printed.count(name) >= 12  # 7 statistics and 5 gradients
    assert "MISS" not in printed


def test_the_real_vocabulary_passes(tool, capsys):
    assert tool("--tokens", "3", "--tensor-model-parallel-size", "2") == 0, capsys.readouterr().out


@pytest.mark.parametrize("function", ["vp_finish", "vp_grad_"])
def test_a_wrong_implementation_is_a_miss(tool, capsys, monkeypatch, function):
    for module in (torch_ops, compiled):
        original = getattr(module, function)
        if function == "vp_finish":
            wrong = lambda p, t, f=original: f(p, t) * 1.001  # noqa: E731
        else:
            wrong = lambda *a, f=original: f(*a).mul_(1.01)  # noqa: E731
        monkeypatch.setattr(module, function, wrong)
    assert tool("--vocab-size", "500", "--dtype", "float32") == 1
    assert "MISS" in capsys.readouterr().out


def test_nan_never_passes():
    assert not check.Row("reverse_kl", float("nan"), 1.0).passed
