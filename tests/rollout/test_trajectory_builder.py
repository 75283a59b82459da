"""Step ids, masks and logprobs are assigned when tokens arrive.

Layer: pure. The loop that appends them: tests/rollout/test_agent_loop.py.
"""

import pytest

from megatron_sod.rollout.trajectory_builder import TrajectoryBuilder
from megatron_sod.types import Prompt, Step

PROMPT = Prompt("p:0", [7, 8], "42", "tiny_world")


@pytest.fixture
def builder():
    builder = TrajectoryBuilder(PROMPT, "p:0/1/2")
    builder.add_turn([10, 11, 12], [-0.1, -0.2, -0.3], [4, 4, 5])
    builder.set_outcome("user_error", 2)
    builder.add_context([90, 91])
    builder.add_turn([13], [-0.4], [5])
    return builder


def test_every_list_has_one_entry_per_response_token(builder):
    t = builder.finish("answer", 1.0)
    assert t.response_token_ids == [10, 11, 12, 90, 91, 13]
    assert t.loss_mask == [True, True, True, False, False, True]
    assert t.step_ids == [1, 1, 1, 0, 0, 2]
    assert t.rollout_logprobs == [-0.1, -0.2, -0.3, 0.0, 0.0, -0.4]
    assert t.policy_versions == [4, 4, 5, -1, -1, 5]


def test_steps_carry_their_outcome_and_calls(builder):
    t = builder.finish("answer", 1.0)
    assert t.steps == (Step(1, "user_error", 3, 2), Step(2, "none", 1, 0))


def test_the_next_turn_is_conditioned_on_everything_before_it(builder):
    assert builder.token_ids == [7, 8, 10, 11, 12, 90, 91, 13]
    assert builder.last_turn == [13] and builder.num_turns == 2


def test_identity_and_end_are_recorded(builder):
    t = builder.finish("max_length", 0.25)
    assert (t.trajectory_id, t.prompt_id, t.prompt_token_ids) == ("p:0/1/2", "p:0", [7, 8])
    assert (t.finish_reason, t.reward, t.policy_version, t.num_tokens) == ("max_length", 0.25, 5, 8)


def test_weights_changing_within_a_turn_mark_the_trajectory(builder):
    assert builder.finish("answer", 1.0).is_mixed_version
    single = TrajectoryBuilder(PROMPT, "x")
    single.add_turn([1], [0.0], [4])
    single.add_context([2])
    assert not single.finish("answer", 1.0).is_mixed_version


def test_a_version_missing_for_a_token_is_an_error():
    with pytest.raises(AssertionError, match="1 versions for 2 sampled tokens"):
        TrajectoryBuilder(PROMPT, "x").add_turn([1, 2], [0.0, 0.0], [0])


def test_an_empty_response_is_a_trajectory_that_teaches_nothing():
    builder = TrajectoryBuilder(PROMPT, "x")
    builder.add_turn([], [], [])
    t = builder.finish("max_length", 0.0)
    assert t.response_token_ids == [] and not t.is_valid and t.policy_version == -1
    assert t.steps == (Step(1, "none", 0),)


def test_two_turns_without_an_observation_between_them_stay_two_steps():
    builder = TrajectoryBuilder(PROMPT, "x")
    builder.add_turn([1, 2], [0.0, 0.0], [0, 0])
    builder.add_turn([3], [0.0], [0])
    assert builder.finish("answer", 0.0).step_ids == [1, 1, 2]


def test_the_sampled_list_is_copied_not_kept():
    sampled = [1, 2]
    builder = TrajectoryBuilder(PROMPT, "x")
    builder.add_turn(sampled, [0.0, 0.0], [0, 0])
    builder.add_context([3])
    assert sampled == [1, 2] and PROMPT.token_ids == [7, 8]


def test_a_turn_with_too_few_logprobs_is_refused():
    with pytest.raises(AssertionError, match="2 logprobs and 3 versions for 3"):
        TrajectoryBuilder(PROMPT, "x").add_turn([1, 2, 3], [0.0, 0.0], [0, 0, 0])


def test_a_builder_resumed_between_turns_begins_a_new_step(builder):
    builder.add_context([92])
    again = TrajectoryBuilder.resumed(PROMPT, builder.finish("interrupted", 0.0))
    assert not again.is_turn_open and again.num_turns == 2 and again.last_turn == [13]
    again.add_turn([14], [-0.5], [6])
    assert again.finish("answer", 1.0).step_ids == [1, 1, 1, 0, 0, 2, 0, 3]


def test_a_builder_resumed_within_a_turn_goes_on_with_that_step(builder):
    again = TrajectoryBuilder.resumed(PROMPT, builder.finish("interrupted", 0.0))
    assert again.is_turn_open and again.token_ids == builder.token_ids
    again.add_turn([14, 15], [-0.5, -0.6], [6, 6])
    t = again.finish("answer", 1.0)
    assert t.step_ids == [1, 1, 1, 0, 0, 2, 2, 2] and t.policy_versions[-3:] == [5, 6, 6]
    assert again.last_turn == [13, 14, 15] and t.steps[-1] == Step(2, "none", 3)
    assert t.steps[0] == Step(1, "user_error", 3, 2)


def test_resuming_leaves_the_interrupted_trajectory_as_it_was(builder):
    begun = builder.finish("interrupted", 0.0)
    before = repr(begun)
    TrajectoryBuilder.resumed(PROMPT, begun).add_turn([14], [-0.5], [6])
    assert repr(begun) == before
