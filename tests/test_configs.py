"""Every YAML in configs/ loads and validates with the schema its name implies.

Layer: pure. Whether the models a file names exist is checked when a run starts, not here.
"""

from pathlib import Path

import pytest

from megatron_sod.config.load import (
    config_hash,
    load_config,
    load_eval_config,
    load_sft_config,
    to_yaml,
)
from megatron_sod.config.methods import PRESETS
from megatron_sod.config.schema import SftConfig, SodConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "models")


def _load(path: Path) -> SftConfig | SodConfig:
    load = {"sft": load_sft_config, "eval": load_eval_config}
    return load.get(path.name.partition("_")[0], load_config)(path)


TRAINED = [path for path in FILES if path.parent == CONFIGS and not path.name.startswith("eval_")]


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.name)
def test_every_job_fits_its_machines(path):
    make_plan = pytest.importorskip("megatron_sod.plan.plan").make_plan
    assert make_plan(_load(path)).problems == []


@pytest.mark.parametrize("student", ["qwen3-0.6b", "qwen3-1.7b"])
def test_both_students_have_a_configuration_of_every_method(student):
    found = {_load(p).method for p in TRAINED if f"_{student}_" in p.name and p.name[:3] != "sft"}
    assert found >= set(PRESETS)
    assert any(p.name.startswith(f"sft_{student}") for p in TRAINED)


def test_the_papers_settings_are_in_the_files():
    for student, iterations in (("0.6b", 120), ("1.7b", 150)):
        config = load_config(CONFIGS / f"sod_qwen3-{student}_qwen3-4b_1n8g_tp2.yaml")
        train, rollout = config.train, config.rollout
        assert (train.lr, train.train_batch_size, train.ppo_mini_batch_size) == (1e-6, 64, 16)
        assert (rollout.num_generations, rollout.max_turns, train.num_iterations) == (
            16, 16, iterations,
        )  # fmt: skip
        assert (rollout.max_prompt_length, rollout.max_response_length) == (2560, 20480)
        weight = config.distill.step_weight
        assert (weight.epsilon, weight.delta, config.distill.loss) == (
            1e-6, 0.2, "sampled_advantage",
        )  # fmt: skip
        assert (train.adam_beta1, train.adam_beta2, train.weight_decay) == (0.9, 0.999, 0.01)
        sft = load_sft_config(CONFIGS / f"sft_qwen3-{student}_1n8g.yaml")
        assert (sft.train.num_epochs, sft.train.global_batch_size, sft.train.lr) == (5, 128, 5e-5)
    teacher = load_config(CONFIGS / "grpo_qwen3-4b_1n8g_tp4.yaml")
    assert teacher.train.num_iterations == 2 * 30_128 // 64 and teacher.teacher is None


def test_evaluations_follow_the_papers_protocol():
    found = [_load(path) for path in FILES if path.name.startswith("eval_")]
    assert len(found) == 5
    for config in found:
        evaluation, rollout = config.eval, config.rollout
        assert (evaluation.num_samples, evaluation.temperature, evaluation.top_p) == (32, 1.0, 0.6)
        assert (rollout.max_turns, rollout.max_prompt_length) == (16, 4096)
        assert rollout.max_response_length == 20480 and len(evaluation.seeds) == 5
    assert len({config.student.path for config in found}) == 5


def test_both_kinds_of_configuration_are_present():
    kinds = {path.name.startswith("sft_") for path in FILES}
    assert kinds == {True, False}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_file_loads_and_validates(path):
    config = _load(path)
    assert isinstance(config, SftConfig if path.name.startswith("sft_") else SodConfig)
    assert config.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_resolved_file_loads_to_the_same_values(path, tmp_path):
    config = _load(path)
    copy = tmp_path / path.name
    copy.write_text(to_yaml(config))
    assert config_hash(_load(copy)) == config_hash(config)
