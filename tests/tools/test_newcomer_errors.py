"""Mistakes a newcomer makes, over all tools: one clear message that names the thing and the remedy.

Layer: the tools' own main functions in this process, stopped where they would exit.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from megatron_sod.data.tiny_models import STUDENT, write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
DEMO = "configs/demo_cpu.yaml"
ONE_RANK = (
    "cluster.gpus_per_node=1",
    "student.parallel.tensor_model_parallel_size=1",
    "teacher.parallel.tensor_model_parallel_size=1",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """student: usable. other_words: another vocabulary. gpt2: another architecture."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "student", **STUDENT)
    for name in ("other_words", "gpt2", "no_tokenizer"):
        shutil.copytree(folder / "student", folder / name)
    config = json.loads((folder / "gpt2" / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (folder / "gpt2" / "config.json").write_text(json.dumps(config))
    tokenizer = folder / "other_words" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    tokenizer.write_text(json.dumps(content))
    for path in (folder / "no_tokenizer").glob("tokenizer*"):
        path.unlink()
    (folder / "empty").mkdir()
    (folder / "rows.jsonl").write_text('{"question": "2+3?", "answer": "5"}\n{"question": \n')
    (folder / "good.jsonl").write_text('{"q": "2+3?", "a": "5"}\n' * 40)
    return folder


def _run(capsys, monkeypatch, tool: str, *arguments: str) -> str:
    """What the tool says on its way out; it must not succeed."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if set(ONE_RANK) <= set(arguments):
        monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
    told = capsys.readouterr()
    message = told.err + (stopped.value.code if isinstance(stopped.value.code, str) else "")
    assert stopped.value.code not in (0, None), told
    assert "Traceback" not in message
    return message


SOD = ("train_sod", "--config")
# (what went wrong, command, words the message must have: the object, then the remedy)
MISTAKES = [
    ("no such config", (*SOD, "configs/nope.yaml"), ["configs/nope.yaml", "working examples"]),
    (
        "misspelt key",
        (*SOD, DEMO, "train.num_iteration=1"),
        ["num_iteration", "did you mean 'num_iterations'"],
    ),
    ("text for a number", (*SOD, DEMO, "train.lr=fast"), ["train.lr", "fast", "number"]),
    ("no such method", (*SOD, DEMO, "method=dpo"), ["method", "dpo", "sod_no_grpo"]),
    ("odd mini-batch", (*SOD, DEMO, "train.ppo_mini_batch_size=7"), ["multiple", "7"]),
    ("layout and ranks", (*SOD, DEMO, "cluster.gpus_per_node=3"), ["3 ranks", "cluster"]),
    ("plain python", (*SOD, DEMO), ["torchrun --standalone --nproc-per-node 2"]),
    ("bad override", (*SOD, DEMO, "train.lr"), ["train.lr", "key=value"]),
    ("no student", (*SOD, DEMO, *ONE_RANK, "student.path={m}/nope"), ["{m}/nope", "config.json"]),
    ("empty student", (*SOD, DEMO, *ONE_RANK, "student.path={m}/empty"), ["{m}/empty", "Hugging"]),
    ("GPT-2", (*SOD, DEMO, *ONE_RANK, "student.path={m}/gpt2"), ["GPT2LMHeadModel", "Qwen3"]),
    (
        "no tokenizer",
        (*SOD, DEMO, *ONE_RANK, "student.path={m}/no_tokenizer"),
        ["{m}/no_tokenizer", "tokenizer.json"],
    ),
    (
        "another teacher's words",
        (*SOD, DEMO, *ONE_RANK, "teacher.path={m}/other_words"),
        ["tokenizers differ", "share"],
    ),
    ("no data file", (*SOD, DEMO, *ONE_RANK, "data.train=[a.jsonl]"), ["a.jsonl", ".parquet"]),
    (
        "a broken row",
        (*SOD, DEMO, *ONE_RANK, "data.train=[{m}/rows.jsonl]"),
        ["rows.jsonl row 2", "JSON"],
    ),
    (
        "wrong columns",
        (*SOD, DEMO, *ONE_RANK, "data.train=[{m}/good.jsonl]"),
        ["good.jsonl row 1", "data.prompt_key", "'q'"],
    ),
    (
        "prompts too long",
        (*SOD, DEMO, *ONE_RANK, "rollout.max_prompt_length=8"),
        ["max_prompt_length 8", "raise the limit"],
    ),
    (
        "no function",
        (*SOD, DEMO, "reward.kind=import"),
        ["reward.function", "my_rewards:grade"],
    ),
    ("no service", (*SOD, DEMO, "sandbox.kind=sandbox_fusion"), ["sandbox.url", "addresses"]),
    ("no teacher", (*SOD, DEMO, "teacher=null"), ["teacher.path", "method=grpo"]),
    (
        "not a checkpoint",
        (*SOD, DEMO, *ONE_RANK, "train.resume={m}/student"),
        ["{m}/student", "iter_"],
    ),
    (
        "no model to convert",
        ("convert_hf_to_megatron", "--hf", "{m}/nope", "--out", "{m}/out"),
        ["{m}/nope", "config.json"],
    ),
    (
        "a full folder to convert into",
        ("convert_hf_to_megatron", "--hf", "configs/demo/student", "--out", "{m}/student"),
        ["{m}/student", "empty"],
    ),
    (
        "no checkpoint to convert",
        ("convert_megatron_to_hf", "--checkpoint", "{m}/student", "--out", "{m}/out"),
        ["{m}/student", "checkpoint"],
    ),
    ("not a run", ("inspect_run", "{m}/empty"), ["{m}/empty", "metrics.jsonl"]),
    (
        "an open sandbox",
        ("sandbox_server", "--host", "0.0.0.0", "--port", "0"),
        ["SOD_SANDBOX_TOKEN", "0.0.0.0"],
    ),
]


@pytest.mark.parametrize(("what", "command", "words"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_gets_one_message_with_a_remedy(
    what, command, words, models, tmp_path, capsys, monkeypatch
):
    command = [part.replace("{m}", str(models)) for part in command]
    if command[0] == "train_sod":
        command.append(f"observe.run_dir={tmp_path}/run")
    message = _run(capsys, monkeypatch, *command)
    for word in words:
        assert word.replace("{m}", str(models)) in message, message
    assert len(message) < 1500, message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
