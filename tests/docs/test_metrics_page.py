"""docs/metrics.md explains every scalar there is. Layer: text. A whole row: tests/end_to_end."""

from megatron_sod.observe.metrics import rollout_metrics
from megatron_sod.observe.reference_names import (
    REFERENCE_NAMES,
    validation_scalars,
    with_reference_names,
)
from megatron_sod.rollout.waiting import Took, waiting_metrics
from tests.docs.metric_names import undocumented
from tests.observe.test_reference_names import SCALARS


def test_every_name_of_the_reference_is_explained():
    assert undocumented({*REFERENCE_NAMES, *with_reference_names(SCALARS)}) == set()


def test_every_scalar_of_the_rollouts_is_explained():
    waits = waiting_metrics([Took(1.0, 1.0, 1, 1)])
    assert undocumented({*rollout_metrics([], num_text_ids=9), *waits}) == set()


def test_every_scalar_of_an_evaluation_is_explained():
    numbers = {"num_samples": 4, "avg@4": 0.5, "pass": {"2": 0.5, "4": 0.5}, "maj": {"4": 0.5},
               "num_graded": 4, "num_turns": 1, "num_turns_max": 1, "num_turns_min": 1}  # fmt: skip
    assert undocumented(validation_scalars({"aime/2024": numbers})) == set()


def test_a_name_that_is_not_there_is_found_missing():
    assert undocumented({"sod/d_step_3", "sod/d_step_x", "rollout/reward"}) == {
        "sod/d_step_x", "rollout/reward",
    }  # fmt: skip
