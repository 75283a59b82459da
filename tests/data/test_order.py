"""The order of prompts is a function of seed and position.

Layer: pure. That a resumed run continues it: tests/end_to_end.
"""

import pytest

from megatron_sod.data.order import PromptOrder
from megatron_sod.errors import DataError


def test_an_epoch_is_one_permutation_when_batches_divide_it():
    order = PromptOrder(21, seed=3)
    for epoch in range(3):
        drawn = [i for b in range(3) for i in order.draw(21 * epoch + 7 * b, 7)]
        assert sorted(drawn) == list(range(21))


def test_epochs_differ_and_seeds_differ():
    order = PromptOrder(50, seed=0)
    assert order.draw(0, 50) != order.draw(50, 50)
    assert order.draw(0, 50) != PromptOrder(50, seed=1).draw(0, 50)


def test_a_draw_depends_on_the_position_only():
    order = PromptOrder(17, seed=5)
    batches = [order.draw(4 * i, 4) for i in range(12)]
    again = PromptOrder(17, seed=5)
    assert [again.draw(4 * i, 4) for i in reversed(range(12))] == batches[::-1]


@pytest.mark.parametrize(("num_prompts", "count"), [(5, 3), (7, 7), (7, 5), (10, 4), (3, 2)])
def test_one_batch_never_holds_a_prompt_twice(num_prompts, count):
    order = PromptOrder(num_prompts, seed=2)
    for step in range(60):
        drawn = order.draw(step * count, count)
        assert len(set(drawn)) == count and set(drawn) <= set(range(num_prompts))


def test_without_shuffling_prompts_come_in_file_order():
    order = PromptOrder(5, seed=9, shuffle=False)
    assert order.draw(0, 3) == [0, 1, 2]
    assert order.draw(5, 5) == [0, 1, 2, 3, 4]
    # positions 3..6 are 3, 4, 0, 1: two epochs meet and nothing repeats
    assert order.draw(3, 4) == [3, 4, 0, 1]


def test_a_prompt_met_twice_is_replaced_by_one_not_in_the_batch():
    order = PromptOrder(4, seed=0, shuffle=False)
    drawn = order.draw(2, 4)  # 2, 3, 0, 1
    assert drawn == [2, 3, 0, 1]
    shuffled = PromptOrder(4, seed=0)
    assert sorted(shuffled.draw(3, 4)) == [0, 1, 2, 3]


def test_a_draw_shuffles_each_epoch_it_touches_once(monkeypatch):
    shuffled, plain = [], PromptOrder._epoch

    def counted(self, epoch):
        shuffled.append(epoch)
        return plain(self, epoch)

    monkeypatch.setattr(PromptOrder, "_epoch", counted)
    PromptOrder(30_128, seed=0).draw(30_100, 64)
    assert shuffled == [0, 1]  # not once per prompt: 64 shuffles of 30,128 take more than a second


def test_a_batch_larger_than_the_data_is_refused_with_the_remedy():
    with pytest.raises(DataError, match="train.train_batch_size 6 exceeds the 5 usable prompts"):
        PromptOrder(5, seed=0).draw(0, 6)
