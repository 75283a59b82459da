"""Loading: defaults, overrides, presets, and every problem named at once.

Layer: pure, with YAML files in a temporary folder. The shipped files are tested in
tests/test_configs.py; command lines in tests/tools.
"""

import pytest

from megatron_sod.config.load import config_hash, load_config, load_sft_config, to_yaml
from tests.config.minimal import BASE, problems


def test_a_minimal_file_gets_every_default(write):
    config = load_config(write(BASE))
    assert config.train.lr == 1e-6 and config.distill.step_weight.delta == 0.2
    assert config.rollout.num_generations == 16 and config.method == "sod"


def test_defaults_chain_and_the_nearer_file_wins(write):
    write(BASE + "seed: 1\nname: far\n", "base/far.yaml")
    write("defaults: [far.yaml]\nseed: 2\n", "base/near.yaml")
    path = write("defaults: [base/near.yaml]\ntrain: {num_iterations: 7}\n")
    config = load_config(path)
    assert (config.name, config.seed, config.train.num_iterations) == ("far", 2, 7)


def test_the_last_of_several_defaults_wins(write):
    write(BASE + "seed: 1\n", "a.yaml")
    write("seed: 2\n", "b.yaml")
    assert load_config(write("defaults: [a.yaml, b.yaml]\n")).seed == 2


def test_one_default_may_be_given_without_a_list(write):
    write(BASE + "seed: 5\n", "a.yaml")
    assert load_config(write("defaults: a.yaml\n")).seed == 5


@pytest.mark.parametrize("first", ["b.yaml", "../{folder}/b.yaml", "./b.yaml"])
def test_defaults_in_a_circle_are_an_error_however_they_are_spelled(write, tmp_path, first):
    write(f"defaults: ['{first.format(folder=tmp_path.name)}']\n", "a.yaml")
    write("defaults: [a.yaml]\n", "b.yaml")
    assert "circle" in problems(tmp_path / "a.yaml")


def test_a_missing_default_is_named(write, tmp_path):
    assert str(tmp_path / "gone.yaml") in problems(write("defaults: [gone.yaml]\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a: [1\n", "not valid YAML"), ("- 1\n- 2\n", "expected a mapping"), ("3\n", "expected a")],
)
def test_files_that_are_no_mapping_are_refused(write, text, expected):
    assert expected in problems(write(text))


def test_overrides_win_over_the_file_and_keep_the_rest(write):
    config = load_config(
        write(BASE), ["seed=4", "distill.step_weight.delta=0.1", "--train.num_iterations=9"]
    )
    assert (config.seed, config.distill.step_weight.delta) == (4, 0.1)
    assert config.train.num_iterations == 9 and config.student.path == "models/s"


@pytest.mark.parametrize("text", ["1e-6", "1.0e-6", "0.000001", "1E-6"])
def test_a_number_in_scientific_notation_arrives_as_a_float(write, text):
    in_file = load_config(write(BASE.replace("3}", f"3, lr: {text}}}"))).train.lr
    as_override = load_config(write(BASE), [f"train.lr={text}"]).train.lr
    assert type(in_file) is float and in_file == as_override == 0.000001


def test_lists_and_nulls_can_be_overridden(write):
    config = load_config(write(BASE), ["data.train=[a.jsonl,b.jsonl]", "train.eval_interval=null"])
    assert config.data.train == ["a.jsonl", "b.jsonl"] and config.train.eval_interval is None


def test_an_override_without_a_value_is_an_error(write):
    assert "expected key=value" in problems(write(BASE), ["train.lr"])


def test_a_section_replaced_by_a_number_is_an_error(write):
    assert "train" in problems(write(BASE), ["train=3"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trian.lr=1", "unknown key 'trian'; did you mean 'train'?"),
        ("train.learning_rate=1", "unknown key 'train.learning_rate'"),
        ("teacher.paralel.x=1", "did you mean 'parallel'?"),
        ("distill.step_weight.detla=1", "did you mean 'delta'?"),
        ("teacher.parallel.tensor_parallel_size=2", "did you mean 'tensor_model_parallel_size'?"),
        ("observe.zzz=1", "valid here: run_dir, loggers, project, num_trajectories_kept"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(write, override, expected):
    assert expected in problems(write(BASE), [override])


def test_all_problems_are_listed_at_once(write):
    text = problems(
        write("student: {}\ndata: {train: []}\ntrain: {num_iterations: 0, lr: fast}\nsead: 1\n")
    )
    for expected in (
        "5 problem(s)",
        "missing key 'student.path': directory in Hugging Face format",
        "data.train",
        "train.num_iterations",
        "train.lr",
        "did you mean 'seed'?",
    ):
        assert expected in text


def test_a_missing_section_is_named_once_with_its_keys_to_come(write):
    assert "missing key 'train'" in problems(write("student: {path: a}\ndata: {train: [x]}\n"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.train_batch_size=10", "train.ppo_mini_batch_size=4"], "10 is not a multiple of"),
        (["train.tokens_per_micro_batch=23039"], "below the longest trajectory"),
        (["rollout.max_observation_length=20480"], "max_observation_length must be below"),
        (["cluster.gpus_per_node=3", "student.parallel.tensor_model_parallel_size=2"], "divide"),
        (["student.parallel.sequence_parallel=true"], "needs tensor_model_parallel_size > 1"),
        (["student.parallel.virtual_pipeline_model_parallel_size=2"], "needs pipeline_model"),
        (["student.parallel.expert_model_parallel_size=2"], "expert tensor x expert x pipeline"),
        (["cluster.gpus_per_node=2", "student.parallel.tensor_model_parallel_size=2",
          "student.parallel.expert_tensor_parallel_size=1"], "needs expert_model_parallel_size"),
        (["cluster.gpus_per_node=3", "student.parallel.context_parallel_size=3",
          "rollout.max_prompt_length=2561"], "= 23046"),  # 23041 in 6 equal parts
        (["teacher=null"], "give teacher.path or use method=grpo"),
        (["distill.coef=0", "grpo.coef=0"], "nothing would be learnt"),
        (["sandbox.kind=sandbox_fusion"], "needs sandbox.url"),
        (["method=opsd_gt", "train.tokens_per_micro_batch=24000"], "is not student.path models/s"),
        (["method=opsd_gt", "teacher.path=models/s"], "max_privileged_length = 23552"),
        (["teacher.source=self", "teacher.path=models/s"], "the student's own opinion"),
        (["distill.withdraw={start_iteration: 3, end_iteration: 3}"], "must be above start"),
        (["method=opd_naive", "distill.withdraw={start_iteration: 0, end_iteration: 3}"],
         "nothing would be learnt from then on"),
        (["ref_compat=true", "distill.step_weight.d_floor=0.1"], "no d_floor or w_min"),
        (["ref_compat=true", "distill.loss=jsd"], "sampled_advantage only"),
        (["ref_compat=true", "distill.step_weight.source=reverse_kl"], "source sampled only"),
        (["ref_compat=true", "distill.exclude_token_ids=[1]"], "or exclude_token_ids"),
        (["ref_compat=true", "rollout.correct_mismatch=true"], "does not correct"),
        (["ref_compat=true", "rollout.max_staleness=1"], "does not correct"),
        (["reward.kind=import"], "needs reward.function"),
        (["rollout.engine.quantization=fp8"], "quantization fp8 is not supported yet"),
        (["rollout.engine.lora_rank=8"], "lora_rank is not supported yet"),
        (["transfer.backend=vllm_ipc", "cluster.gpus_per_node=2"], "one trainer rank only"),
        (["transfer.backend=vllm_nccl"], "needs rollout.placement=disaggregated"),
        (["method=grpo", "teacher=null", "eval.teacher=true"], "eval.teacher needs a teacher"),
        (["rollout.replay=x/rollouts", "rollout.record=true"], "exclude each other"),
        (["rollout.partial_prompts=65"], "65 exceeds train.train_batch_size 64"),
        (["rollout.replay=runs/sod/rollouts"], "give the replay another `name`"),
        (["cluster.gpus_per_node=2", "teacher.parallel.tensor_model_parallel_size=3"],
         "teacher.parallel: tensor x pipeline x context parallel size 3"),
    ],
)  # fmt: skip
def test_rules_over_several_keys_say_what_to_change(write, overrides, expected):
    assert expected in problems(write(BASE), overrides)


def test_several_broken_rules_are_listed_together(write):
    text = problems(
        write(BASE), ["train.ppo_mini_batch_size=7", "reward.kind=import", "teacher=null"]
    )
    assert "3 problem(s)" in text


def test_limits_exactly_met_are_accepted(write):
    # 2560 prompt + 20480 response tokens = 23040
    config = load_config(write(BASE), ["train.tokens_per_micro_batch=23040"])
    assert config.train.tokens_per_micro_batch == 23040


@pytest.mark.parametrize("text", ["method: ${nowhere}\n", "seed: ${nowhere}\n"])
def test_a_reference_to_a_missing_key_is_a_configuration_error(write, text):
    assert "nowhere" in problems(write(BASE + text))


def test_the_hash_changes_with_any_value_and_only_with_values(write):
    path = write(BASE)
    reference = config_hash(load_config(path))
    assert config_hash(load_config(path, ["seed=0"])) == reference
    assert len(reference) == 12
    for override in ("seed=1", "distill.step_weight.epsilon=2e-6", "rollout.engine.max_num_seqs=9"):
        assert config_hash(load_config(path, [override])) != reference


def test_the_resolved_yaml_loads_to_the_same_values(write):
    config = load_config(write(BASE), ["method=opd_naive", "train.lr=3e-5", "name=a-b", "seed=07"])
    again = load_config(write(to_yaml(config), "resolved.yaml"))
    assert again == config


def test_a_resolved_yaml_ignores_presets_of_its_method(write):
    config = load_config(write(BASE), ["method=opd_naive", "grpo.coef=1"])
    assert load_config(write(to_yaml(config), "resolved.yaml")).grpo.coef == 1.0


def test_the_cold_start_schema_is_checked_the_same_way(write):
    path = write(
        "student: {path: s}\ndata: {conversations: [c.jsonl]}\ntrain: {num_steps: 2}\nout: o\n"
    )
    assert load_sft_config(path, ["train.lr=5e-5"]).train.lr == 5e-5
    assert "did you mean 'num_steps'?" in problems(path, ["train.num_step=1"], load_sft_config)
    text = problems(
        path,
        ["cluster.gpus_per_node=3", "student.parallel.pipeline_model_parallel_size=2"],
        load_sft_config,
    )
    assert "does not divide" in text


def test_a_configuration_cannot_be_changed_after_it_was_checked(write):
    config = load_config(write(BASE))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
