"""One batch, fixed weights: the same loss, d_k, w_k, scores and gradients in every layout.

Layers: gloo on 1, 2 and 4 CPU ranks, float64. The faults show that the comparison can fail. Pure
arithmetic is tested in algorithm/, the op in ops/, logits against transformers in tests/model.
"""

from __future__ import annotations

import pytest
import torch

from megatron_sod.scoring.certificate import Case, measure
from megatron_sod.scoring.certificate_cases import (
    CP2,
    DENSE,
    FAMILIES,
    PP2,
    SMALL,
    SP,
    TP2,
    TRUTH,
    write_models,
)  # fmt: skip
from tests.helpers.gloo import run_on_ranks
from tests.scoring.faults import FAULTS

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

# fault: (case it shows in, quantity that must differ)
SHOWN_BY = {
    "gradient_times_tp": (Case(2, TP2), "gradients"),
    "mean_of_means": (Case(2, {}, None, SMALL), "gradients"),
    "dropped_step_at_cp_boundary": (Case(2, CP2), "d_k"),
    "stale_tied_head": (Case(2, PP2), "scores"),
    "norm_gradients_not_shared": (Case(2, {**TP2, **SP}), "copies"),
}
SAME = {name: DENSE[name] for name in ("split", "tp2 sp", "pp2", "cp2", "tp2, teacher pp2")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("certificate")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, folder):
    """(name, models, tolerance, measurements of all cases and of the truth)."""
    cases, tolerance = FAMILIES[request.param]
    models = write_models(folder / request.param, request.param)
    return request.param, models, tolerance, _measured(TRUTH | cases, models)


def test_every_layout_gives_the_numbers_of_a_single_process(family):
    name, _, tolerance, measured = family
    for case_name, case in FAMILIES[name][0].items():
        errors = measured[case_name].errors(measured[case.loss])
        assert max(errors.values()) <= tolerance, (case_name, errors)


def test_the_comparison_is_about_something(family):
    """Several micro-batches where it says so, drift in every step, no gradient that is zero."""
    _, _, _, measured = family
    truth = measured["sampled_advantage"]
    assert truth.num_micro_batches == 1 and measured["split"].num_micro_batches > 2
    assert all(float(grad.abs().max()) > 0 for grad in truth.gradients.values())
    steps = torch.cat([rows.T for rows in truth.steps.values()])
    assert len(steps) >= 15 and bool((steps[:, 0] > 0.01).all()) and len(steps[:, 1].unique()) > 5


def test_scored_logprobs_are_those_of_the_two_models_on_disk(family):
    """In every layout, by the test above; here of a single process, against transformers."""
    from transformers import AutoModelForCausalLM

    from megatron_sod.data.synthetic import synthetic_trajectories

    _, models, tolerance, measured = family
    readers = [
        # its grouped products of experts know no float64
        AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float64, experts_implementation="eager"
        )
        for path in models
    ]
    found = measured["sampled_advantage"].logprobs
    for trajectory in synthetic_trajectories(3, 3, vocab_size=384, seed=5):
        if not trajectory.is_valid:
            continue
        ids = torch.tensor([trajectory.prompt_token_ids + trajectory.response_token_ids])
        before = len(trajectory.prompt_token_ids)
        kept = torch.tensor(trajectory.loss_mask)
        for reader, rows in zip(readers, found[trajectory.trajectory_id], strict=True):
            with torch.no_grad():
                logprobs = reader(ids).logits.double().log_softmax(-1)[0, before - 1 : -1]
            expected = logprobs.gather(-1, ids[0, before:, None])[:, 0][kept]
            # transformers normalises and rotates in float32
            assert float((rows - expected).abs().max()) < 1e-4


def test_a_student_that_is_its_own_teacher_has_no_divergence_and_full_weights(folder):
    student, _ = write_models(folder / "same", "dense")
    for name, result in _measured(SAME, (student, student)).items():
        for rows in result.steps.values():
            assert float(rows[0].abs().max()) <= 1e-10, name
            assert float((rows[1] - 1.0).abs().max()) <= 1e-3, name


@pytest.mark.parametrize("fault", SHOWN_BY)
def test_deliberate_faults_make_it_fail(faulty, fault):
    errors = faulty[fault].errors(faulty["truth"])
    assert errors[SHOWN_BY[fault][1]] > 1e-6, errors


@pytest.fixture(scope="module")
def faulty(folder):
    models = write_models(folder / "faulty", "dense")
    cases = {fault: case for fault, (case, _) in SHOWN_BY.items()}
    truth = run_on_ranks(1, _measure_with_faults, {"none": Case(1)}, models)[0]["none"]
    return {"truth": truth, **run_on_ranks(2, _measure_with_faults, cases, models)[0]}


def _measured(cases: dict[str, Case], models: tuple[str, str]) -> dict:
    results: dict = {}
    for ranks in sorted({case.ranks for case in cases.values()}):
        these = {name: case for name, case in cases.items() if case.ranks == ranks}
        results |= run_on_ranks(ranks, _measure, these, models)[0]
    return results


def _measure(cases: dict[str, Case], models: tuple[str, str]) -> dict:
    return {name: measure(case, *models) for name, case in cases.items()}


def _measure_with_faults(cases: dict[str, Case], models: tuple[str, str]) -> dict:
    results = {}
    for name, case in cases.items():
        with FAULTS[name]():
            results[name] = measure(case, *models)
    return results
