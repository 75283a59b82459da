"""Every prompt is drawn, trained on and counted once: with overlap, with carried groups, after a
resume at any iteration.

Layer: pure; the controller is a function that completes what it likes. Real runs: tests/end_to_end.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from dataclasses import replace

import pytest

from megatron_sod.data.order import PromptOrder
from megatron_sod.errors import RolloutError
from megatron_sod.rollout.groups import GroupBoard, GroupResult
from megatron_sod.rollout.recording import Recording
from megatron_sod.rollout.source import LiveRollouts, RecordedRollouts
from megatron_sod.types import Prompt
from tests.helpers.tiny import sod_config, synthetic_trajectories

PLAIN = synthetic_trajectories(2, 1, vocab_size=11, seed=0)[0]
PROMPTS = [Prompt(f"p:{i}", [1, 2], "7", "tiny_world") for i in range(40)]
ITERATIONS, BATCH, SIZE = 6, 4, 2


class Engines:
    """Runs groups in a random order and interrupts the rest."""

    def __init__(self, seed: int = 0):
        self._rng = random.Random(seed)
        self.asked: list[list[str]] = []
        self.version = 0

    def run(self, groups, sampling, *, what, num_needed):
        self.asked.append([f"{g.prompt.prompt_id}/{g.tag}" for g in groups])
        board = GroupBoard(groups, max_in_flight=999, num_needed=num_needed)
        running = []
        while (index := board.start_next()) is not None:
            running.append(index)
        self._rng.shuffle(running)
        for index in running:
            group, reason = groups[index], "interrupted" if board.is_enough else "answer"
            trajectories = [
                replace(
                    PLAIN,
                    trajectory_id=group.trajectory_id(i),
                    finish_reason=reason,
                    policy_version=self.version,
                )
                for i in range(SIZE)
            ]
            board.finish(index, GroupResult(trajectories, Counter(sandbox_retries=1)))
        return board.result()


def _source(engines, recording=None, **rollout):
    config = sod_config(
        "s",
        "t",
        rollout={"num_generations": SIZE, **rollout},
        train={"num_iterations": ITERATIONS, "train_batch_size": BATCH, "ppo_mini_batch_size": 2},
    )
    return LiveRollouts(engines.run, PROMPTS, PromptOrder(40, 1), config, recording)


def _iterate(source, first=1, last=ITERATIONS, *, is_ahead=False, checkpoints=None):
    """As the pipeline does; the trajectory ids of each iteration."""
    collected = []
    for iteration in range(first, last + 1):
        num_trained = (iteration - 1) * BATCH
        collected.append([t.trajectory_id for t in source.collect(iteration, num_trained)])
        if is_ahead and iteration < ITERATIONS:
            source.start_ahead(iteration + 1, num_trained + BATCH)
        source.finish_ahead()
        if checkpoints is not None:
            folder = checkpoints / str(iteration)
            folder.mkdir()
            source.store(folder)
    return collected


@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("partial", [0, 1, BATCH])
def test_every_prompt_is_trained_on_once_in_the_datas_order(is_ahead, partial):
    source = _source(Engines(), partial_prompts=partial)
    collected = _iterate(source, is_ahead=is_ahead)
    flat = [name for iteration in collected for name in iteration]
    assert len(flat) == len(set(flat)) == ITERATIONS * BATCH * SIZE
    drawn = {f"p:{i}" for i in PromptOrder(40, 1).draw(0, ITERATIONS * BATCH)}
    assert {name.split("/")[0] for name in flat} == drawn, "no prompt beyond the run's end"
    for iteration, names in enumerate(collected, start=1):
        assert {int(name.split("/")[1]) for name in names} <= {iteration, iteration - 1}


def test_without_overlap_and_carrying_the_batches_are_the_datas_batches():
    engines = Engines()
    _iterate(_source(engines))
    for number, asked in enumerate(engines.asked):
        expected = PromptOrder(40, 1).draw(number * BATCH, BATCH)
        assert asked == [f"p:{i}/{number + 1}" for i in expected]


@pytest.mark.parametrize("resume_after", range(1, ITERATIONS))
@pytest.mark.parametrize(("is_ahead", "partial"), [(True, 0), (False, 2), (True, 2)])
def test_a_resumed_run_goes_on_with_what_was_ahead_or_carried(
    tmp_path, is_ahead, partial, resume_after
):
    options = {"partial_prompts": partial}
    engines = Engines()
    source = _source(engines, **options)
    before = _iterate(source, last=resume_after, is_ahead=is_ahead, checkpoints=tmp_path)
    rng = engines._rng.getstate()
    undisturbed = _iterate(source, first=resume_after + 1, is_ahead=is_ahead)
    again = Engines()
    again._rng.setstate(rng)
    resumed = _source(again, **options)
    resumed.restore(tmp_path / str(resume_after))
    assert _iterate(resumed, first=resume_after + 1, is_ahead=is_ahead) == undisturbed
    flat = [name for iteration in before + undisturbed for name in iteration]
    assert len(flat) == len(set(flat)) == ITERATIONS * BATCH * SIZE


@pytest.mark.parametrize("is_ahead", [False, True])
def test_what_is_discarded_is_counted_told_and_begins_anew(is_ahead, capfd):
    engines = Engines()
    source = _source(engines, partial_prompts=2)
    trained = {name for names in _iterate(source, last=2, is_ahead=is_ahead) for name in names}
    left = [name for name in engines.asked[-1] if f"{name}/0" not in trained]
    assert len(left) == 2 + BATCH * is_ahead  # what was carried, and what was ahead
    source.discard()
    assert f"{len(left) * SIZE} trajectories" in capfd.readouterr().err
    collected = source.collect(2, 2 * BATCH)  # back by one iteration
    assert sorted(engines.asked[-1][: len(left)]) == sorted(f"{name}+" for name in left), (
        "ids differ from those of the trajectories thrown away"
    )
    assert len(collected) == BATCH * SIZE
    assert source.metrics["rollout/discarded"] == len(left) * SIZE
    source.collect(3, 3 * BATCH)
    assert source.metrics["rollout/discarded"] == 0, "counted once"


@pytest.mark.parametrize("stored_after", [None, "rollback", "next iteration"])
@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("partial", [0, 1, 3])
def test_after_going_back_every_prompt_is_still_drawn_once(
    tmp_path, is_ahead, partial, stored_after
):
    """What was carried or ahead was trained on by nobody, though it is no end of the order."""
    for seed in range(10):
        engines = Engines(seed)
        source = _source(engines, partial_prompts=partial)
        collected = _iterate(source, last=3, is_ahead=is_ahead)
        source.discard()
        for iteration in range(2, ITERATIONS + 1):  # back to iteration 1, with two batches used up
            if stored_after == ("rollback" if iteration == 2 else "next iteration"):
                folder = tmp_path / f"{seed}-{iteration}"
                folder.mkdir()
                source.store(folder)
                source = _source(engines, partial_prompts=partial)
                source.restore(folder)
            num_trained = (iteration + 1) * BATCH
            collected.append([t.trajectory_id for t in source.collect(iteration, num_trained)])
            if is_ahead and iteration < ITERATIONS:
                source.start_ahead(iteration + 1, num_trained + BATCH)
            source.finish_ahead()
        flat = [name for names in collected for name in names]
        assert len(flat) == len(set(flat)) == (ITERATIONS + 2) * BATCH * SIZE
        expected = {f"p:{i}" for i in PromptOrder(40, 1).draw(0, (ITERATIONS + 2) * BATCH)}
        assert {name.split("/")[0] for name in flat} == expected, f"seed {seed}"


def test_after_going_back_no_token_of_the_weights_taken_back_is_collected():
    """With a rollout ahead: versions 0 to 3 are bad, the engines then get version 4."""
    engines = Engines()
    source = _source(engines, max_staleness=1)
    for iteration in range(1, 4):
        source.collect(iteration, (iteration - 1) * BATCH)
        source.start_ahead(iteration + 1, iteration * BATCH)
        source.finish_ahead()
        engines.version = iteration
    source.discard()
    engines.version = 4
    versions = []
    for iteration in range(2, 5):  # from the checkpoint of iteration 1; 12 prompts are used up
        collected = source.collect(iteration, (iteration + 1) * BATCH)
        versions.append({t.policy_version for t in collected})
        source.start_ahead(iteration + 1, (iteration + 2) * BATCH)
        source.finish_ahead()
        engines.version += 1
    assert versions == [{4}, {4}, {5}], "on-policy once, then one behind as always"


def test_a_strictly_on_policy_run_stores_nothing(tmp_path):
    _iterate(_source(Engines()), checkpoints=tmp_path)
    assert not [path for folder in tmp_path.iterdir() for path in folder.iterdir()]


def test_a_rollout_ahead_runs_beside_and_its_failure_is_raised_when_it_is_waited_for():
    release = threading.Event()

    class Failing(Engines):
        def run(self, groups, sampling, **options):
            if self.asked:
                release.wait(10)
                raise RolloutError("engine 0 died")
            return super().run(groups, sampling, **options)

    source = _source(Failing(), max_staleness=1)
    source.collect(1, 0)
    source.start_ahead(2, BATCH)  # returns although the rollout waits
    release.set()
    with pytest.raises(RolloutError, match="engine 0 died"):
        source.finish_ahead()


def test_what_is_collected_is_recorded_and_replayed(tmp_path):
    recording = Recording(tmp_path)
    source = _source(Engines(), recording, max_staleness=1)
    first = source.collect(1, 0)
    source.start_ahead(2, BATCH)
    second = source.collect(2, BATCH)
    replayed = RecordedRollouts(recording)
    assert repr([replayed.collect(1, 0), replayed.collect(2, BATCH)]) == repr([first, second])
    assert replayed.metrics == {}
