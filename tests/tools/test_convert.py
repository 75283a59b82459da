"""The conversion command lines: arguments, progress, exit codes. The rest: tests/convert."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.tiny import write_model_with_weights

ROOT = Path(__file__).resolve().parents[2]


def _run(tool: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, f"tools/{tool}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)


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


@pytest.mark.slow
def test_logits_are_compared_on_request_and_a_wrong_model_is_found(tmp_path):
    source = write_model_with_weights(tmp_path / "source", seed=7, scale=0.2)
    (tmp_path / "texts").write_text("12 + 7\n\nfour times five\n")
    check = ("--check-logits", tmp_path / "texts")
    done = _run("convert_hf_to_megatron", "--hf", source, "--out", tmp_path / "m", *check)
    assert done.returncode == 0, done.stderr
    logits = json.loads((tmp_path / "m/parity.json").read_text())["logits"]
    assert 0 <= logits["max_abs_error"] <= 1e-5 < logits["largest_logit"]
    assert logits["num_tokens"] > 10
    assert "largest difference" in done.stdout

    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**config, "rms_norm_eps": 1.0}))
    check_again = (
        "import sys; from megatron_sod.scoring.logits_parity import check_logits; "
        "check_logits(sys.argv[1], sys.argv[2], ['12 + 7'])"
    )
    command = [sys.executable, "-c", check_again, source, tmp_path / "m"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 1 and "the model computes something else" in done.stderr


def test_help_says_what_the_sizes_decide():
    done = _run("convert_hf_to_megatron", "--help")
    assert "loads at every layout" in done.stdout and "cut into files" in done.stdout
