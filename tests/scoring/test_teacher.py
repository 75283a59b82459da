"""A teacher with another number of vocabulary rows, and its hidden states off the device.

Layers: gloo on 1 and 2 CPU ranks, float64, through the certificate. Teachers of the student's
vocabulary in other layouts: test_certificate. Comparing tokenizers: tests/model/test_parity.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sod.data.synthetic import write_model_with_weights
from megatron_sod.scoring import certificate
from megatron_sod.scoring.certificate import Case, Measurement, measure
from megatron_sod.scoring.certificate_cases import CP2, PP2, SMALL, TP2
from tests.helpers.gloo import run_on_ranks

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

FEW, MANY = 381, 530  # padded to 384 and 640 at TP 1, to 512 and 768 at TP 2
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
CASES = {
    "tp1": Case(1),
    "tp1 jsd": Case(1, loss="jsd"),
    "tp2": Case(2, TP2),
    "tp2 jsd": Case(2, TP2, loss="jsd"),
    "pp2 split": Case(2, PP2, tokens_per_micro_batch=SMALL),
    "tp2 jsd, teacher pp2": Case(2, TP2, PP2, loss="jsd"),
    "dp2 split, teacher tp2": Case(2, {}, TP2, tokens_per_micro_batch=SMALL),
    "pp2 jsd, teacher cp2": Case(2, PP2, CP2, loss="jsd"),
}
# What is measured once more while everything but the host's copy of hidden states is destroyed.
ON_HOST = ("tp1 jsd", "tp2 jsd, teacher pp2", "pp2 jsd, teacher cp2")
TEACHERS = {"bigger": (FEW, MANY), "smaller": (MANY, FEW)}  # rows of student and teacher


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[tuple[str, str], Measurement]:
    """(teacher's size, case) -> result; the truth is of models cut to the shared rows."""
    folder = tmp_path_factory.mktemp("vocabularies")
    jobs: dict[int, dict] = {1: {}, 2: {}}
    for teacher, rows in TEACHERS.items():
        models = _models(folder / teacher, *rows)
        cut = [_cut(model) for model in models]
        for loss in ("sampled_advantage", "jsd"):
            jobs[1][teacher, f"truth {loss}"] = (Case(1, loss=loss), cut, "")
        for name, case in CASES.items():
            jobs[case.ranks][teacher, name] = (case, models, "")
        for name in ON_HOST:
            jobs[CASES[name].ranks][teacher, f"{name} on host"] = (CASES[name], models, "on host")
        jobs[1][teacher, "all rows"] = (Case(1), models, "all rows")
    results: dict = {}
    for ranks, job in jobs.items():
        results |= run_on_ranks(ranks, _measure, job)[0]
    return results


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("name", CASES)
def test_models_are_compared_over_the_rows_both_have(measured, teacher, name):
    """Loss, scores, d_k, w_k and gradients are those of models cut to them."""
    truth = measured[teacher, f"truth {CASES[name].loss}"]
    errors = _shared(measured[teacher, name]).errors(truth)
    assert max(errors.values()) <= 1e-10, errors


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("name", CASES)
def test_rows_beyond_get_no_gradient(measured, teacher, name):
    gradient = measured[teacher, name].gradients["model.embed_tokens.weight"]  # and head: tied
    assert len(gradient) == TEACHERS[teacher][0] and bool((gradient[FEW:] == 0).all())


def test_the_comparison_notices_a_student_that_gives_its_padding_probability(measured):
    truth, found = (measured["smaller", n] for n in ("truth sampled_advantage", "all rows"))
    errors = _shared(found).errors(truth)
    assert min(errors[name] for name in ("loss", "scores", "d_k", "gradients")) > 1e-6, errors


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("name", ON_HOST)
def test_hidden_states_of_the_teacher_are_used_from_host_memory_alone(measured, teacher, name):
    """What stayed on the device is overwritten with NaN, and nothing changes by one bit."""
    errors = measured[teacher, f"{name} on host"].errors(measured[teacher, name])
    assert set(errors.values()) == {0.0}, errors


def _models(folder: Path, student_rows: int, teacher_rows: int) -> list[str]:
    common = dict(dtype=torch.float64, num_hidden_layers=2, num_key_value_heads=4)
    student = write_model_with_weights(
        folder / "student", seed=1, vocab_size=student_rows, **common
    )
    teacher = write_model_with_weights(
        folder / "teacher",
        seed=2,
        vocab_size=teacher_rows,
        hidden_size=128,
        tie_word_embeddings=False,
        **common,
    )
    return [str(student), str(teacher)]


def _cut(model_dir: str) -> str:
    """The same model with the shared vocabulary rows alone."""
    source, target = Path(model_dir), Path(f"{model_dir}_cut")
    target.mkdir()
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "vocab_size": FEW}))
    tensors = load_file(source / "model.safetensors")
    cut = {n: t[:FEW].clone() if n in VOCABULARY else t for n, t in tensors.items()}
    save_file(cut, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def _shared(found: Measurement) -> Measurement:
    cut = {n: g[:FEW] if n in VOCABULARY else g for n, g in found.gradients.items()}
    return replace(found, gradients=cut)


def _measure(jobs: dict) -> dict:
    results = {}
    for name, (case, models, change) in jobs.items():
        with _CHANGES[change]():
            results[name] = measure(case, *models)
    return results


@contextlib.contextmanager
def _all_rows():
    """The student's softmax runs over all of its own rows; the tokens are the same."""
    of = certificate.synthetic_trajectories

    def few(*args, vocab_size: int, seed: int):
        return of(*args, vocab_size=FEW, seed=seed)

    with (
        mock.patch.object(certificate, "shared_vocab_size", lambda student, _: student.vocab_size),
        mock.patch.object(certificate, "synthetic_trajectories", few),
    ):
        yield


def _poisoned_device():
    """As on a GPU: another tensor, and the memory of the first is used for something else."""

    def to_host(tensor: torch.Tensor) -> torch.Tensor:
        host = tensor.clone()
        tensor.fill_(float("nan"))
        return host

    return mock.patch("megatron_sod.scoring.teacher.to_host", to_host)


_CHANGES = {"": contextlib.nullcontext, "all rows": _all_rows, "on host": _poisoned_device}
