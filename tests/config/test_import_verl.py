"""Every key of a launch script is carried over or accounted for, and the result is valid.

Layer: pure, with a file for the loader. The command line: tests/tools/test_import_config.py.
"""

import pytest

from megatron_sod.config import verl_keys
from megatron_sod.config.import_verl import import_verl
from megatron_sod.config.load import load_config
from megatron_sod.config.schema import SodConfig
from megatron_sod.config.verl_script import Script, read_script
from megatron_sod.errors import ConfigError
from tests.config.launch_scripts import SOD


def _import(*overrides: str, **options):
    return import_verl(Script(list(overrides)), **options)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "imported.yaml"
    path.write_text(import_verl(read_script(SOD), num_prompts=30_128).to_yaml())
    return load_config(path)


def test_the_recipe_becomes_a_valid_configuration(config):
    assert (config.method, config.name, config.cluster.gpus_per_node) == ("sod", "sod_small", 8)
    weight = config.distill.step_weight
    assert (weight.policy, weight.epsilon, weight.delta, config.distill.coef) == (
        "sod", 1e-6, 0.2, 1.0,
    )  # fmt: skip
    assert config.student.path == "models/qwen3-1.7b" and config.teacher.path == "models/qwen3-4b"
    assert config.student.parallel.tensor_model_parallel_size == 4
    assert config.teacher.parallel == config.student.parallel
    assert config.data.eval == ["data/aime25.parquet", "data/aime24.parquet"]
    assert config.rollout.num_generations == config.rollout.max_turns == 16
    assert (config.rollout.engine.tensor_parallel_size, config.rollout.engine.num_engines) == (4, 2)
    assert config.train.num_iterations == 470  # 30,128 // 64, as the paper counts an epoch
    assert config.train.lr == 1e-6 and config.train.tokens_per_micro_batch == 23_040
    assert (config.eval.num_samples, config.eval.top_p) == (32, 0.6)
    assert config.reward.overlong_buffer == 1024


def test_every_key_is_accounted_for():
    script = read_script(SOD)
    done = import_verl(script, num_prompts=30_128)
    keys = {word.partition("=")[0].lstrip("+") for word in script.overrides}
    assert keys <= {*done.carried, *done.left}
    assert not set(done.carried) & set(done.left)
    assert done.left["trainer.a_key_of_tomorrow"].startswith("unknown")
    assert done.left["trainer.logger mlflow"].startswith("no counterpart")
    text = done.to_yaml()
    assert all(f"# not carried over: {key}: " in text for key in done.left)


def test_the_table_names_keys_that_exist():
    def exists(dotted: str) -> bool:
        model = SodConfig
        for part in dotted.split("."):
            field = getattr(model, "model_fields", {}).get(part)
            if field is None:
                return False
            kinds = getattr(field.annotation, "__args__", (field.annotation,))
            model = next((k for k in kinds if hasattr(k, "model_fields")), field.annotation)
        return True

    assert [key for key in verl_keys.SAME.values() if not exists(key)] == []
    assert not set(verl_keys.SAME) & {*verl_keys.ONLY, *verl_keys.NOWHERE}


def test_a_value_without_a_counterpart_is_named_with_the_value():
    done = _import("actor_rollout_ref.rollout.name=sglang", "algorithm.adv_estimator=gae")
    assert done.left["actor_rollout_ref.rollout.name"].endswith("(the script has sglang)")
    assert done.left["algorithm.adv_estimator"].startswith("no counterpart")


def test_without_a_teacher_term_it_is_grpo():
    done = _import(
        "algorithm.token_kl_reg.enable=False",
        "algorithm.token_kl_reg.stepwise_delta=0.2",
        "actor_rollout_ref.ref.model.path=t",
        "actor_rollout_ref.model.path=s",
    )
    assert done.values["method"] == "grpo"
    assert not any(key.startswith(("teacher.", "distill.")) for key in done.values)
    assert "no teacher" in done.left["actor_rollout_ref.ref.model.path"]


def test_the_gated_method_of_the_recipe_is_refused():
    with pytest.raises(ConfigError, match="stepwise_enable is off.*no method here does"):
        _import("algorithm.token_kl_reg.enable=True")


def test_epochs_need_the_number_of_prompts():
    done = _import("trainer.total_epochs=2", "data.train_batch_size=64")
    assert "--num-prompts" in done.left["trainer.total_epochs"]
    done = _import("trainer.total_epochs=2", "data.train_batch_size=64", num_prompts=100)
    assert done.values["train.num_iterations"] == 3  # 200 // 64


def test_megatron_sizes_are_kept_for_both_roles():
    done = _import(
        "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2",
        "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=2",
        "actor_rollout_ref.ref.megatron.tensor_model_parallel_size=4",
        "actor_rollout_ref.actor.ulysses_sequence_parallel_size=8",
        "actor_rollout_ref.ref.model.path=t",
        "algorithm.token_kl_reg.enable=True",
        "algorithm.token_kl_reg.stepwise_enable=True",
    )
    parallel = {k: v for k, v in done.values.items() if ".parallel." in k}
    assert parallel == {
        "student.parallel.tensor_model_parallel_size": 2,
        "student.parallel.pipeline_model_parallel_size": 2,
        "teacher.parallel.tensor_model_parallel_size": 4,
    }


@pytest.mark.parametrize(("theirs", "ours"), [(0.75, 0.6), (0.5, 0.5)])
def test_engines_leave_room_for_training(theirs, ours):
    done = _import(f"actor_rollout_ref.rollout.gpu_memory_utilization={theirs}")
    assert done.values["rollout.engine.gpu_memory_utilization"] == ours
    assert any(f"instead of {theirs}" in note for note in done.assumed) == (theirs != ours)


def test_a_buffer_that_is_off_is_off():
    prefix = "reward_model.reward_kwargs.overlong_buffer_cfg"
    done = _import(f"{prefix}.enable=False", f"{prefix}.len=1024")
    assert "reward.overlong_buffer" not in done.values
    assert {f"{prefix}.enable", f"{prefix}.len"} <= set(done.left)


@pytest.mark.parametrize(
    ("overrides", "resume"),
    [
        (["trainer.resume_mode=disable"], "never"),
        (["trainer.resume_mode=auto"], "auto"),
        (["trainer.resume_mode=resume_path", "trainer.resume_from_path=x/y"], "x/y"),
    ],
)
def test_resuming(overrides, resume):
    assert _import(*overrides).values["train.resume"] == resume


def test_one_clip_ratio_is_both():
    values = _import("actor_rollout_ref.actor.clip_ratio=0.1").values
    assert (values["grpo.clip_low"], values["grpo.clip_high"]) == (0.1, 0.1)


def test_nothing_to_import_is_refused():
    with pytest.raises(ConfigError, match="no key=value found"):
        import_verl(read_script("echo hello"))
