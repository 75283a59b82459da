"""--dry-run refuses what would not fit, names the phase and the remedy, and needs no GPU.

Layers: the plan in this process, then the command under plain python with torch, megatron, ray and
vllm out of reach.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sod.config.load import load_config
from megatron_sod.config.schema import SodConfig
from megatron_sod.errors import ConfigError
from megatron_sod.plan.dry_run import dry_run
from megatron_sod.plan.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]


def _config(**sections) -> SodConfig:
    values = {
        "cluster": {"gpus_per_node": 8, "gpu": "h100-80gb"},
        "student": {"path": "models/Qwen3-0.6B", "dtype": "bfloat16"},
        "teacher": {"path": "models/Qwen3-4B", "dtype": "bfloat16"},
        "data": {"train": ["x.jsonl"]},
        "rollout": {"engine": {"num_engines": 8, "gpu_memory_utilization": 0.25}},
        "train": {"num_iterations": 1},
        **sections,
    }
    return SodConfig.model_validate(values)


def _engine(**keys) -> dict:
    return {"engine": {"num_engines": 8, "gpu_memory_utilization": 0.25, **keys}}


def test_a_sensible_configuration_fits(capsys):
    dry_run(_config())
    out = capsys.readouterr().out
    assert "fits" in out and "does not fit" not in out
    for said in ("Ranks", "rollout", "score", "train", "transfer", "save", "KV cache", "optimizer"):
        assert said in out


@pytest.mark.parametrize(
    ("sections", "phase", "remedy"),
    [
        (
            {"rollout": _engine(gpu_memory_utilization=0.95)},
            "rollout",
            r"lower rollout\.engine\.gpu_memory_utilization to 0\.\d",
        ),
        (
            {"train": {"num_iterations": 1, "tokens_per_micro_batch": 200_000}},
            "train",
            "lower train.tokens_per_micro_batch",
        ),
        (
            {"train": {"num_iterations": 1, "tokens_per_micro_batch": 200_000}},
            "score",
            "lower train.tokens_per_micro_batch",
        ),
        (
            {"student": {"path": "models/Qwen3-32B", "dtype": "bfloat16"}},
            "save",
            "raise student.parallel.tensor_model_parallel_size",
        ),
        (
            {
                "student": {"path": "models/Qwen3-4B", "dtype": "bfloat16"},
                "teacher": {"path": "models/Qwen3-32B", "dtype": "bfloat16"},
            },
            "transfer",
            "set teacher.param_offload=true",
        ),
        (
            {
                "student": {"path": "models/Qwen3-4B", "dtype": "bfloat16"},
                "teacher": {
                    "path": "models/Qwen3-32B",
                    "dtype": "bfloat16",
                    "param_offload": True,
                },
            },
            "score",
            "raise teacher.parallel.tensor_model_parallel_size",
        ),
        (
            {"rollout": _engine(gpu_memory_utilization=0.06)},
            "rollout",
            "raise rollout.engine.gpu_memory_utilization",
        ),
        ({"rollout": _engine(num_engines=9)}, "rollout", "lower rollout.engine.num_engines"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_phase_and_a_remedy(sections, phase, remedy, capsys):
    config = _config(**sections)
    with pytest.raises(ConfigError, match=rf"does not fit in phase .*{phase}"):
        dry_run(config)
    problems = [line for line in make_plan(config).problems if line.startswith(f"{phase}:")]
    assert len(problems) == 1
    assert re.search(remedy, problems[0])
    assert problems[0] in capsys.readouterr().out


def test_the_named_utilization_fits():
    refused = make_plan(_config(rollout=_engine(gpu_memory_utilization=0.95))).problems
    share = min(float(problem.rsplit(" ", 1)[1]) for problem in refused)
    assert make_plan(_config(rollout=_engine(gpu_memory_utilization=share))).problems == []
    assert make_plan(_config(rollout=_engine(gpu_memory_utilization=share + 0.05))).problems


def test_models_that_cannot_be_split_or_compared_are_refused():
    parallel = {"tensor_model_parallel_size": 8}
    student = {"path": "models/Qwen2.5-7B-Instruct", "dtype": "bfloat16", "parallel": parallel}
    with pytest.raises(ConfigError) as refused:
        make_plan(_config(student=student, teacher={"path": "models/Llama-3.1-8B-Instruct"}))
    assert "student.parallel.tensor_model_parallel_size 8" in str(refused.value)
    assert "vocabulary of 128256 rows, the student has 152064" in str(refused.value)


def test_a_teacher_is_planned_with_the_students_vocabulary_rows():
    """Qwen2.5 pads one tokenizer to 152064 rows from 7B on and to 151936 below."""
    seven, half = (f"models/Qwen2.5-{size}-Instruct" for size in ("7B", "0.5B"))
    for student, teacher, rows in ((half, seven, 151936), (seven, half, 152064)):
        both = {"student": {"path": student}, "teacher": {"path": teacher}}
        plan = make_plan(_config(**both))
        assert plan.job.teacher.geometry.vocab_size == rows


def test_a_tied_head_is_copied_to_the_last_stage():
    parallel = {"pipeline_model_parallel_size": 2}
    plan = make_plan(
        _config(
            student={"path": "models/Qwen3-0.6B", "dtype": "bfloat16", "parallel": parallel},
            teacher={"path": "models/Qwen3-4B", "dtype": "bfloat16", "parallel": parallel},
        )
    )
    first, last = (phases["train"] for phases in plan.memory.values())
    # 14 layers and the same 151,936 x 1024 head each; the last has the final norm too
    assert last["weights"] - first["weights"] == 2 * 1024
    assert "logits" in last and "logits" not in first
    assert first["activations"] > last["activations"]  # two micro-batches in flight


WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "vllm", "ray", "megatron", "transformers"}:
            raise ModuleNotFoundError(f"{name} is blocked by this test", name=name)
sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("tool", "config", "override", "status"),
    [
        ("train_sod.py", "configs/demo_cpu.yaml", "seed=1", 0),
        ("train_sft.py", "configs/demo/sft_teacher.yaml", "seed=1", 0),
        ("train_sod.py", "configs/demo_cpu.yaml", "student.path=models/Qwen3-8B", 1),
    ],
)
def test_the_command_runs_on_a_machine_without_torch(tool, config, override, status):
    command = [sys.executable, "-c", WITHOUT, f"tools/{tool}", "--config", config, "--dry-run"]
    run = subprocess.run([*command, override], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == status, run.stderr
    if status == 0:
        assert "Memory of a rank" in run.stdout
    else:  # the student's vocabulary is not the teacher's
        assert run.stderr.count("error:") == 1 and "vocabulary" in run.stderr


def test_the_demo_is_planned_as_it_is():
    plan = make_plan(load_config(ROOT / "configs/demo_cpu.yaml"))
    assert plan.job.student.geometry.hidden_size == 64 and plan.problems == []
