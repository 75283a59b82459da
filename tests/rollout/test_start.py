"""In which order engines and models come into the memory of one GPU.

Layer: pure, with controllers that only note what is asked of them. What vLLM does when memory moves
while it starts: vllm/v1/worker/gpu_worker.py, determine_available_memory. Starting real engines:
test_controller.
"""

import pytest
import torch

from megatron_sod.rollout import controller as controller_module
from megatron_sod.rollout import start
from tests.helpers.tiny import sod_config


@pytest.fixture
def noted(monkeypatch):
    notes: list[str] = []

    class Controller:
        def __init__(
            self, config, model, *, load_weights, vocab_size=None, machines=(), counts=None
        ):
            self.counts = {} if counts is None else counts
            self.name = "teacher" if load_weights else "student"
            notes.append(f"{self.name} starts")

        def wait_until_ready(self, what):
            notes.append(f"{self.name} is ready")

    monkeypatch.setattr(controller_module, "RolloutController", Controller)
    monkeypatch.setattr(start, "from_rank0", lambda work, timeout_s: work())
    return notes


def run(monkeypatch, *, on_gpu: bool, placement: str = "colocated", notes: list[str]) -> list[str]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    config = sod_config("s", "t", rollout={"placement": placement})
    engines = start.start_engines(config, vocab_size=9, machines=[], with_teacher=True)
    start.wait_before_models(config, *engines)
    notes.append("models load")
    start.wait_until_ready(config, engines[0])
    return notes


def test_on_shared_gpus_one_after_another(monkeypatch, noted):
    notes = run(monkeypatch, on_gpu=True, notes=noted)
    loading = notes.index("models load")
    assert notes.index("student is ready") < notes.index("teacher starts")
    assert notes.index("teacher is ready") < loading


def test_engines_with_gpus_of_their_own_start_while_models_load(monkeypatch, noted):
    notes = run(monkeypatch, on_gpu=True, placement="disaggregated", notes=noted)
    assert notes.index("student is ready") < notes.index("teacher starts")
    assert "teacher is ready" not in notes


def test_without_gpus_everything_starts_at_once(monkeypatch, noted):
    notes = run(monkeypatch, on_gpu=False, notes=noted)
    assert notes == ["student starts", "teacher starts", "models load", "student is ready"]


def test_what_happens_to_the_teachers_engines_is_on_the_students_account(noted):
    config = sod_config("s", "t")
    student, teacher = start.start_engines(config, vocab_size=9, machines=[], with_teacher=True)
    assert teacher.counts is student.counts


def test_a_replay_waits_for_nothing(monkeypatch, noted):
    config = sod_config("s", "t", rollout={"replay": "somewhere"})
    start.wait_until_ready(config, None)
    start.wait_before_models(config, None, None)
    assert noted == []
