"""Mistakes a newcomer makes with tools/train_sod.py: one clear error each, nothing left running.

Layers: the checks themselves in this process (cheap), one real torchrun for exit code and orphans.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sod.config.load import load_config
from megatron_sod.convert.to_megatron import convert_hf_to_megatron
from megatron_sod.data.tiny_models import write_tiny_model
from megatron_sod.errors import SodError
from tests.helpers.launch import ROOT, end, processes_of, start

DEMO = str(ROOT / "configs/demo_cpu.yaml")


@pytest.fixture(autouse=True)
def in_repository_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def open_inputs(*overrides: str):
    """What every rank checks before anything is started."""
    from megatron_sod.inputs import Inputs

    return Inputs(load_config(DEMO, list(overrides)))


def test_the_demo_configuration_itself_is_accepted():
    inputs = open_inputs()
    assert len(inputs.prompts) == 4096 and len(inputs.eval_prompts) == 256


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["student.path=/nowhere"], r"/nowhere: no config\.json.*give the path"),
        (["distill.step_weight.dleta=0.1"], r"unknown key.*did you mean 'delta'"),
        (["train.ppo_mini_batch_size=5"], "not a multiple of train.ppo_mini_batch_size 5"),
        (["train.lr=fast"], "train.lr.*number"),
        (["data.train=[missing.jsonl]"], r"missing\.jsonl: no such file"),
        (["student.parallel.tensor_model_parallel_size=3"], "does not divide"),
        (["train.train_batch_size=8192"], "exceeds the 4096 usable prompts"),
        (["rollout.max_prompt_length=4"], "no usable prompt"),
        (["method=opd", "teacher=null", "eval.teacher=false"], "give teacher.path"),
        (["reward.kind=import"], "needs reward.function"),
    ],
)
def test_mistake_gives_one_clear_error(overrides, says):
    with pytest.raises(SodError, match=says):
        open_inputs(*overrides)


def test_empty_prompt_file_is_refused(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(SodError, match="no usable prompt"):
        open_inputs(f"data.train=[{empty}]")


def test_teacher_with_another_tokenizer_is_refused(tmp_path):
    teacher = write_tiny_model(tmp_path / "teacher")
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SodError, match="student and teacher tokenizers differ"):
        open_inputs(f"teacher.path={teacher}")


def test_a_teacher_that_engines_cannot_load_is_refused(tmp_path):
    convert_hf_to_megatron("configs/demo/teacher", tmp_path / "teacher")
    path = f"teacher.path={tmp_path / 'teacher'}"
    with pytest.raises(SodError, match="eval.teacher.*convert_megatron_to_hf"):
        open_inputs(path, "eval.teacher=true")
    assert open_inputs(path, "eval.teacher=false").teacher == open_inputs().teacher


def test_print_config_is_quick_and_complete():
    command = [sys.executable, "tools/train_sod.py", "--config", DEMO, "--print-config"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "step_weight:" in out and "log_ratio_clip:" in out


@pytest.mark.dist
def test_failed_start_exits_with_one_message_and_leaves_no_process(tmp_path: Path):
    marker = str(tmp_path / "run")
    log = tmp_path / "log"
    process = start(
        "train_sod.py",
        "--config",
        DEMO,
        f"observe.run_dir={marker}",
        "student.path=/nowhere",
        nproc=2,
        log=log,
    )
    try:
        assert process.wait(timeout=120) != 0
    finally:
        end(process)
    lines = [line for line in log.read_text().splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "/nowhere" in lines[0]
    assert processes_of(marker) == []
