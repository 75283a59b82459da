"""Collapse is noticed from the metrics, and healthy training is not called collapse.

Layer: pure. That an alarm pauses or rolls back a real run: tests/end_to_end.
"""

import math

import pytest

from megatron_sod.config.schema import WatchdogConfig
from megatron_sod.observe.watchdog import SIGNALS, Watchdog

HEALTHY = {
    "rollout/tool_calls_avg": 3.2,
    "rollout/infra_error_rate": 0.0,
    "tool/malformed_rate": 0.05,
    "rollout/student_tokens": 900.0,
    "actor/student_entropy": 0.6,
    "actor/grad_norm": 0.5,
    "actor/steps_skipped": 0.0,
    "sod/w_mean": 0.8,
    "sod/frac_r_beyond_10": 0.002,
    "sod/d_mean": 0.3,
    "actor/teacher_mass": 0.7,
}


def _run(series: dict[str, list[float]], **settings) -> dict[str, int]:
    """Key of each signal that raised an alarm -> the iteration of its first one."""
    watchdog, first = Watchdog(WatchdogConfig(**settings)), {}
    for number in range(len(next(iter(series.values())))):
        row = HEALTHY | {name: values[number] for name, values in series.items()}
        for alarm in watchdog.check({"iteration": number + 1, **row}):
            first.setdefault(alarm.signal.key, alarm.iteration)
    return first


def test_the_reported_collapse_of_tool_calls_trips():
    """3.7 calls per trajectory to 0.5 within twenty iterations, as the public reports have it."""
    calls = [3.7 - 3.2 * i / 19 for i in range(20)]
    # baseline: median of the first three, 3.53; half of it, 1.77, is passed at iteration 13
    assert _run({"rollout/tool_calls_avg": calls}) == {"min_tool_calls_share": 14}


def test_the_other_reported_collapse_trips_too():
    calls = [2.1, 2.0, 2.2, 1.9, 1.8, 1.5, 1.3, 1.1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5]
    assert _run({"rollout/tool_calls_avg": calls}) == {"min_tool_calls_share": 10}


def test_healthy_training_raises_nothing():
    """Entropy and divergence fall slowly, lengths drift, gradients are noisy: that is learning."""
    steps = range(60)
    series = {
        "actor/student_entropy": [0.8 * 0.98**i for i in steps],
        "sod/d_mean": [0.4 * 0.97**i for i in steps],
        "rollout/student_tokens": [900 + 5 * i for i in steps],
        "rollout/tool_calls_avg": [3.2 - 0.02 * i for i in steps],
        "actor/grad_norm": [0.5 + 0.4 * math.sin(i) for i in steps],
    }
    assert _run(series) == {}


@pytest.mark.parametrize(
    ("metric", "bad", "key"),
    [
        ("rollout/tool_calls_avg", 0.4, "min_tool_calls_share"),
        ("rollout/infra_error_rate", 0.03, "warn_infra_error_rate"),
        ("tool/malformed_rate", 0.7, "max_malformed_rate"),
        ("rollout/student_tokens", 90.0, "min_response_length_share"),
        ("rollout/student_tokens", 9000.0, "max_response_length_share"),
        ("actor/student_entropy", 0.02, "min_entropy_share"),
        ("actor/grad_norm", 66.99, "max_grad_norm_ratio"),
        ("actor/steps_skipped", 1.0, "max_steps_skipped"),
        ("sod/w_mean", 0.01, "min_step_weight"),
        ("sod/frac_r_beyond_10", 0.2, "max_extreme_ratio_share"),
        ("sod/d_mean", 2.0, "max_divergence_share"),
        ("actor/teacher_mass", 0.1, "min_teacher_mass_share"),
    ],
)
def test_each_signal_trips_on_its_own_after_its_patience(metric, bad, key):
    series = {metric: [HEALTHY[metric]] * 8 + [bad] * 3}
    assert _run(series) == {key: 10}
    assert _run(series, patience=3) == {key: 11}
    assert _run(series, **{key: None}) == {}


def test_every_signal_is_a_setting_with_a_default():
    assert all(getattr(WatchdogConfig(), signal.key) is not None for signal in SIGNALS)


def test_one_bad_iteration_is_no_collapse():
    assert _run({"rollout/tool_calls_avg": [3.2, 3.2, 3.2, 0.1, 3.2, 0.1, 3.2]}) == {}


def test_nan_is_out_of_bounds():
    assert _run({"sod/d_mean": [0.3] * 4 + [math.nan] * 2}) == {"max_divergence_share": 6}


def test_an_iteration_without_a_number_is_no_reference_for_later_ones():
    norms = [math.nan] + [0.5] * 4 + [math.nan] * 2 + [0.5] * 3 + [66.99] * 2
    watchdog, alarms = Watchdog(WatchdogConfig()), []
    for iteration, norm in enumerate(norms, start=1):
        found = watchdog.check({"iteration": iteration, "actor/grad_norm": norm})
        alarms += [(alarm.iteration, alarm.bound) for alarm in found]
    assert alarms == [(12, 5.0)]  # too few numbers before the two without one; median 0.5 later


def test_a_metric_the_method_does_not_have_is_silent():
    watchdog = Watchdog(WatchdogConfig())
    for iteration in range(1, 9):
        row = {"iteration": iteration, "rollout/tool_calls_avg": 3.0}  # grpo: no d_k, no w_k
        assert watchdog.check(row) == []


def test_a_resumed_run_remembers_where_it_started():
    rows = [{"iteration": i + 1, **HEALTHY} for i in range(5)]
    resumed = Watchdog(WatchdogConfig(), history=rows)
    low = HEALTHY | {"rollout/tool_calls_avg": 1.0}
    assert resumed.check({"iteration": 6, **low}) == []
    (alarm,) = resumed.check({"iteration": 7, **low})
    assert (alarm.since, alarm.iteration, alarm.value, alarm.bound) == (6, 7, 1.0, 1.6)
    assert "tool calls per trajectory 1 is below 1.6 since iteration 6" in str(alarm)
    assert "watchdog.min_tool_calls_share" in str(alarm)


def test_after_a_rollback_the_bad_iterations_have_not_happened():
    watchdog = Watchdog(WatchdogConfig())
    for i in range(1, 8):
        calls = 3.2 if i < 6 else 0.5
        alarms = watchdog.check({"iteration": i, "rollout/tool_calls_avg": calls})
    assert [alarm.since for alarm in alarms] == [6]
    watchdog.forget_after(5)
    assert watchdog.check({"iteration": 6, "rollout/tool_calls_avg": 0.5}) == []
