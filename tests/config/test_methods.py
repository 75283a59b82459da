"""Methods as presets: which keys each sets, and what wins over them.

Layer: pure, with YAML files in a temporary folder. Loading itself: test_load.py; that each method
trains: tests/train/test_methods.py.
"""

from typing import get_args

import pytest

from megatron_sod.config.load import load_config
from megatron_sod.config.methods import PRESETS
from megatron_sod.config.schema import SodConfig
from tests.config.minimal import BASE, problems


@pytest.mark.parametrize(
    ("method", "grpo", "distill", "policy"),
    [
        ("sod", 1.0, 1.0, "sod"),
        ("sod_no_grpo", 0.0, 1.0, "sod"),
        ("opd", 1.0, 1.0, "uniform"),
        ("opd_naive", 0.0, 1.0, "uniform"),
        ("sod_no_cap", 1.0, 1.0, "no_cap"),
        ("sod_running_clip", 1.0, 1.0, "running_clip"),
        ("sod_heuristic", 1.0, 1.0, "heuristic"),
        ("sod_mask_after_wrong", 1.0, 1.0, "mask_after_wrong"),
        ("grpo", 1.0, 0.0, "sod"),
    ],
)
def test_a_method_presets_its_keys(write, method, grpo, distill, policy):
    config = load_config(write(BASE), [f"method={method}"])
    assert (config.grpo.coef, config.distill.coef) == (grpo, distill)
    assert config.distill.step_weight.policy == policy
    assert method in PRESETS


@pytest.mark.parametrize(("method", "told"), [("opsd_gt", "answer"), ("opsd_hint", "hint")])
def test_a_self_teacher_is_the_student_told_more(write, method, told):
    text = BASE.replace("teacher: {path: models/t}\n", "").replace(
        "{path: models/s}",
        "{path: models/s, dtype: bfloat16, parallel: {tensor_model_parallel_size: 2}}",
    )
    config = load_config(
        write(text), [f"method={method}", "cluster.gpus_per_node=2",
                      "train.tokens_per_micro_batch=24000"]
    )  # fmt: skip
    assert (config.teacher.source, config.teacher.privileged) == ("self", told)
    assert config.teacher.path == "models/s" and config.teacher.dtype == "bfloat16"
    assert config.teacher.parallel == config.student.parallel
    assert config.distill.step_weight.policy == "uniform" and config.grpo.coef == 1.0


def test_every_method_of_the_schema_has_a_preset():
    assert set(get_args(SodConfig.model_fields["method"].annotation)) == set(PRESETS)


def test_ref_compat_takes_the_references_values_unless_told_otherwise(write):
    assert load_config(write(BASE)).distill.log_ratio_clip == 10.0
    assert load_config(write(BASE), ["ref_compat=true"]).distill.log_ratio_clip is None
    own = ["ref_compat=true", "distill.log_ratio_clip=3"]
    assert load_config(write(BASE), own).distill.log_ratio_clip == 3.0


def test_a_key_in_the_file_wins_over_the_preset(write):
    path = write(BASE + "method: opd_naive\ngrpo: {coef: 0.5}\n")
    config = load_config(path)
    assert config.grpo.coef == 0.5 and config.distill.step_weight.policy == "uniform"


def test_an_override_wins_over_the_preset(write):
    path = write(BASE + "method: grpo\n")
    assert load_config(path, ["distill.coef=0.25"]).distill.coef == 0.25


def test_a_method_given_as_override_brings_its_own_preset(write):
    config = load_config(write(BASE + "method: opd\n"), ["method=sod"])
    assert config.distill.step_weight.policy == "sod"


def test_an_unknown_method_is_refused_with_the_known_ones(write):
    text = problems(write(BASE), ["method=soda"])
    assert "method" in text and "opd_naive" in text
