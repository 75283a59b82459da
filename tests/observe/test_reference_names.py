"""Dashboards made for the reference find their numbers, with the reference's meaning and sign.

Layer: pure. That an iteration measures every one of them: tests/end_to_end.
"""

from megatron_sod.observe.reference_names import (
    REFERENCE_NAMES,
    validation_scalars,
    with_reference_names,
)

SCALARS = {
    "iteration": 3,
    "actor/student_entropy": 0.5,
    "actor/kl_k1": 0.25,
    "actor/advantage": 0.1,
    "actor/advantage_max": 2.0,
    "rollout/num_turns": 3.0,
    "rollout/num_turns_max": 6.0,
    "rollout/score_mean": 0.75,
    "rollout/tokens": 2000.0,
    "time/rollout_s": 4.0,
    "sod/w_mean": 0.9,
}


def test_scalars_carry_the_references_names_beside_ours():
    both = with_reference_names(SCALARS)
    assert {name: both[name] for name in SCALARS} == SCALARS
    assert both["actor/entropy"] == 0.5 and both["training/global_step"] == 3
    assert (both["critic/advantages/mean"], both["critic/advantages/max"]) == (0.1, 2.0)
    assert both["critic/score/mean"] == 0.75
    assert "critic/advantages/min" not in both  # what was not measured has no name
    assert both["timing_per_token_ms/gen"] == 2.0  # 4 s for 2000 tokens


def test_the_sign_and_the_turns_are_the_references():
    both = with_reference_names(SCALARS)
    assert both["actor/token_kl/mean"] == -0.25  # teacher - student there, the KL's k1 here
    assert both["num_turns/mean"] == 6.0  # 3 assistant turns, 2 tool results, and one
    assert both["num_turns/max"] == 12.0


def test_no_name_of_ours_is_given_another_meaning():
    clash = set(REFERENCE_NAMES) & set(REFERENCE_NAMES.values())
    assert clash == set()


def _numbers(n, avg, best, maj, turns, graded=4):
    return {"num_samples": n, f"avg@{n}": avg, "pass": best, "maj": maj, "num_graded": graded,
            "num_turns": turns, "num_turns_max": 5, "num_turns_min": 1}  # fmt: skip


def test_each_source_of_a_mixed_benchmark_has_its_own_accuracy():
    aime = _numbers(4, 0.25, {"1": 0.25, "2": 0.4, "4": 0.5}, {"1": 0.25, "2": 0.3, "4": 0.35}, 3.0)
    code = _numbers(4, 0.5, {"1": 0.5, "2": 0.6, "4": 1.0}, {"1": None, "2": None, "4": None}, 1.0,
                    graded=12)  # fmt: skip
    found = validation_scalars({"aime2024": aime, "lcb": code})
    assert found.pop("val-aux/num_turns/mean") == 2 * (3.0 * 4 + 1.0 * 12) / 16
    assert (found.pop("val-aux/num_turns/max"), found.pop("val-aux/num_turns/min")) == (10, 2)
    assert found == {
        "val-core/aime2024/acc/mean@4": 0.25,
        "val-core/aime2024/acc/best@4/mean": 0.5,
        "val-core/aime2024/acc/maj@4/mean": 0.35,
        "val-aux/aime2024/acc/best@2/mean": 0.4,
        "val-aux/aime2024/acc/maj@2/mean": 0.3,
        "val-core/lcb/acc/mean@4": 0.5,
        "val-core/lcb/acc/best@4/mean": 1.0,  # programs cannot vote
        "val-aux/lcb/acc/best@2/mean": 0.6,
    }


def test_one_sample_has_a_mean_and_no_best_or_majority_of_several():
    found = validation_scalars({"x": _numbers(1, 0.5, {"1": 0.5}, {"1": 0.5}, 2.0)})
    assert found.pop("val-core/x/acc/mean@1") == 0.5
    assert len(found) == 3  # turns


def test_a_source_without_a_graded_sample_has_no_number():
    nothing = _numbers(1, None, {"1": None}, {"1": None}, 0.0, graded=0)
    assert validation_scalars({"x": nothing}) == {}
