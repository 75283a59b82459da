"""What a privileged teacher reads: the same marker at the end, the answer nowhere else.

Layers: pure, with the tiny tokenizer and the real one where it is provided; then the batch in
which teacher and student rows agree. What follows from the scores: tests/scoring.
"""

from dataclasses import replace

import pytest
import torch

from megatron_sod.data import tiny_world
from megatron_sod.data.batch import build_training_batch
from megatron_sod.data.chat import ChatFormat
from megatron_sod.data.packing import Alignment
from megatron_sod.data.privileged import privileged_ids, teacher_prompts
from megatron_sod.errors import DataError
from megatron_sod.types import Prompt
from tests.helpers.tiny import synthetic_trajectories
from tests.helpers.tokenizers import qwen3_tokenizer, tiny_tokenizer

MESSAGES = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "Compute left to right: 12 + 30"},
]


@pytest.fixture(params=[tiny_tokenizer, qwen3_tokenizer])
def chat(request):
    return ChatFormat(request.param(), tools=tiny_world.TOOLS)


def _ids(chat, text, kind="answer", extra=400):
    return privileged_ids(chat, MESSAGES, kind, text, max_extra_length=extra)


@pytest.mark.parametrize("kind", ["answer", "hint"])
def test_the_text_stands_in_the_last_user_message_and_the_ends_are_equal(chat, kind):
    plain, told = chat.decode(chat.prompt_ids(MESSAGES)), chat.decode(_ids(chat, "42!", kind))
    head, _, tail = plain.partition("12 + 30")
    assert told.startswith(head + "12 + 30\n\n") and told.endswith(tail)
    assert told.count("42!") == 1 and "42!" not in plain
    marker = chat.prompt_ids(MESSAGES)[-4:]
    assert _ids(chat, "42!", kind)[-4:] == marker


def test_a_long_text_is_cut_to_the_allowance(chat):
    allowance = 150
    told = _ids(chat, "first 7 " + "word 7 " * 400, extra=allowance)
    longer = len(told) - len(chat.prompt_ids(MESSAGES))
    assert allowance - 8 <= longer <= allowance
    assert "first 7" in chat.decode(told)


@pytest.mark.parametrize(("text", "extra"), [("", 400), ("  \n", 400), ("42", 3)])
def test_no_text_or_no_room_gives_no_prompt(chat, text, extra):
    assert _ids(chat, text, extra=extra) is None


def _prompts(*hints):
    return [
        Prompt(f"p{i}", [1, 2], "7", "", MESSAGES, hint=hint) for i, hint in enumerate(hints)
    ]  # fmt: skip


def test_rows_without_a_hint_are_left_out_and_counted(capsys):
    chat = ChatFormat(tiny_tokenizer(), tools=None)
    found = teacher_prompts(_prompts("add", "", "sub"), chat, "hint", max_extra_length=300)
    assert sorted(found) == ["p0", "p2"]
    assert "1 of 3 prompts have no hint" in capsys.readouterr().err
    with_answers = teacher_prompts(_prompts("", ""), chat, "answer", max_extra_length=300)
    assert sorted(with_answers) == ["p0", "p1"]


def test_a_data_set_without_any_hint_is_refused():
    chat = ChatFormat(tiny_tokenizer(), tools=None)
    with pytest.raises(DataError, match="none of 2 prompts has one"):
        teacher_prompts(_prompts("", ""), chat, "hint", max_extra_length=300)


@pytest.mark.parametrize(("dp_size", "multiple_of"), [(1, 1), (3, 2)])
def test_teacher_rows_agree_one_to_one_with_the_students(dp_size, multiple_of):
    trajectories = synthetic_trajectories(5, 3, vocab_size=50, seed=4)
    prompts = {f"p{i}": [60 + i] * (11 + i) for i in (0, 1, 3)}  # p2 and p4 have none
    seen = 0
    for rank in range(dp_size):
        batch = build_training_batch(
            trajectories, num_mini_batches=2, tokens_per_micro_batch=70, dp_rank=rank,
            dp_size=dp_size, alignment=Alignment(pack=multiple_of), teacher_prompts=prompts,
        )  # fmt: skip
        for mini in batch.mini_batches:
            assert len(mini.micro_batches) == len(mini.teacher_micro_batches)
            for student, teacher in zip(mini.micro_batches, mini.teacher_micro_batches,
                                        strict=True):  # fmt: skip
                assert student.targets.tolist() == teacher.targets.tolist()
                assert student.step_ids.tolist() == teacher.step_ids.tolist()
                assert student.trajectory_ids.tolist() == teacher.trajectory_ids.tolist()
                assert teacher.token_ids[0, teacher.rows + 1].tolist() == teacher.targets.tolist()
                assert max(student.token_ids.size(1), teacher.token_ids.size(1)) < 70 + multiple_of
                seen += student.rows.numel()
        taught = [t.prompt_id in prompts for t in batch.trajectories]
        assert batch.is_taught.tolist() == taught
    assert seen == sum(sum(t.loss_mask) for t in trajectories if t.is_valid)


def test_teacher_sequences_are_its_prompt_and_the_same_response():
    (trajectory,) = synthetic_trajectories(2, 1, vocab_size=50, seed=4)[:1]
    trajectory = replace(trajectory, prompt_id="p0", finish_reason="answer", reward=1.0)
    batch = build_training_batch(
        [trajectory], num_mini_batches=1, tokens_per_micro_batch=500, dp_rank=0, dp_size=1,
        teacher_prompts={"p0": [90, 91, 92]},
    )  # fmt: skip
    (teacher,) = batch.mini_batches[0].teacher_micro_batches
    assert teacher.token_ids[0].tolist() == [90, 91, 92, *trajectory.response_token_ids]
    assert torch.equal(teacher.position_ids[0], torch.arange(teacher.token_ids.size(1)))
