"""The conversion command lines: arguments, progress, exit codes. The rest: tests/convert."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.helpers.tiny import write_model_with_weights

ROOT = Path(__file__).resolve().parents[2]


def _run(tool: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, f"tools/{tool}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_both_directions_from_the_command_line(tmp_path):
    source = write_model_with_weights(tmp_path / "source", seed=7, dtype=torch.bfloat16)
    layout = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)
    done = _run("convert_hf_to_megatron", "--hf", source, "--out", tmp_path / "m", *layout)
    assert done.returncode == 0, done.stderr
    assert "tensors are equal bit by bit" in done.stdout
    assert "convert: percent 100/100" in done.stderr
    assert len(list((tmp_path / "m").glob("*.distcp"))) == 4

    back = ("--checkpoint", tmp_path / "m", "--out", tmp_path / "hf", "--max-shard-size", "60KB")
    done = _run("convert_megatron_to_hf", *back)
    assert done.returncode == 0, done.stderr
    before = load_file(source / "model.safetensors")
    files = list((tmp_path / "hf").glob("*.safetensors"))
    after = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert len(files) > 2 and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    done = _run("convert_megatron_to_hf", *back)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and "choose another --out" in done.stderr


def test_help_says_what_the_sizes_decide():
    done = _run("convert_hf_to_megatron", "--help")
    assert "loads at every layout" in done.stdout and "cut into files" in done.stdout
