"""Parts of models leave the device whole and come back as they were.

Layers: plain tensors here; the real models, optimizer and loop: tests/train/test_offload.py.
"""

import pytest
import torch

from megatron_sod.parallel.residency import Residency


def _size(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def test_views_of_one_storage_leave_once_and_come_back_bit_by_bit():
    buffer = torch.randn(6, 5)
    views = [buffer[0], buffer[1:].flatten(), buffer.view(-1)[::3]]
    expected = [view.clone() for view in views]
    residency = Residency()
    residency.may_leave("student", lambda: [*views, buffer])
    residency.hold()
    assert _size(buffer) == 0
    assert residency.is_away("student")
    residency.hold("student")
    assert not residency.is_away("student")
    assert all(torch.equal(v, e) for v, e in zip(views, expected, strict=True))


def test_what_is_not_held_leaves_before_what_is_held_comes():
    sizes = []
    teacher, student = torch.ones(4), torch.ones(4)

    def body():
        sizes.append((_size(teacher), _size(student)))
        return [teacher]

    residency = Residency()
    residency.may_leave("teacher", body)
    residency.may_leave("student", lambda: [student])
    residency.hold("teacher")
    assert (_size(teacher), _size(student)) == (16, 0)
    residency.hold("student")
    assert (_size(teacher), _size(student)) == (0, 16)
    assert sizes == [(16, 0)], "the teacher left while the student was still away"


def test_content_that_is_made_anew_is_freed_and_comes_back_as_zeros():
    gradients = torch.ones(7)
    residency = Residency()
    residency.may_leave("optimizer", lambda: [gradients], keeps_content=False)
    residency.hold()
    assert _size(gradients) == 0
    residency.hold("optimizer")
    assert torch.equal(gradients, torch.zeros(7))


def test_state_that_appears_later_leaves_too_and_changed_values_are_the_ones_that_return():
    held = {"moment": torch.ones(3)}
    residency = Residency()
    residency.may_leave("optimizer", held.values)
    residency.hold()
    residency.hold("optimizer")
    held["moment"] += 1
    held["variance"] = torch.full((3,), 5.0)
    residency.hold()
    assert [_size(t) for t in held.values()] == [0, 0]
    residency.hold("optimizer")
    assert held["moment"].tolist() == [2, 2, 2]
    assert held["variance"].tolist() == [5, 5, 5]


def test_step_counters_stay_and_unknown_names_are_always_held():
    step = torch.tensor(3.0)
    residency = Residency()
    residency.may_leave("optimizer", lambda: [step])
    residency.hold("student")
    assert float(step) == 3
    assert not residency.is_away("optimizer")


@pytest.mark.gpu
def test_gpu_memory_is_given_back_while_away():
    weights = torch.randn(1 << 24, device="cuda")
    expected, held = weights.clone().cpu(), torch.cuda.memory_reserved()
    residency = Residency()
    residency.may_leave("student", lambda: [weights])
    residency.hold()
    assert torch.cuda.memory_reserved() <= held - 4 * (1 << 24)
    residency.hold("student")
    assert torch.equal(weights.cpu(), expected)
