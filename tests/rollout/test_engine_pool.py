"""Trajectories keep their engine, engines share the load, a dead one loses no turn.

Layer: pure, with engines that die on demand. Real ones: test_controller.py.
"""

import asyncio
from contextlib import ExitStack

import pytest

from megatron_sod.errors import EngineLost
from megatron_sod.rollout.agent_loop import SampledTurn, Sampling
from megatron_sod.rollout.engine_pool import EnginePool
from megatron_sod.rollout.incidents import Incidents

SAMPLING = Sampling(1.0, 1.0, 8, (0,), 3)


class Mortal:
    """Answers with its name until it dies."""

    def __init__(self, name: int):
        self.name, self.is_dead, self.asked = name, False, []

    async def generate(self, token_ids, sampling):
        self.asked.append((token_ids, sampling))
        await asyncio.sleep(0)
        if self.is_dead:
            raise EngineLost("killed by the test")
        return SampledTurn([self.name], [0.0], [1])


def _pool(count, **options):
    engines, incidents = [Mortal(i) for i in range(count)], Incidents()
    return EnginePool(engines, incidents, **options), engines, incidents


async def _turn(lease):
    return (await lease.generate([1, 2], SAMPLING)).token_ids[0]


def test_trajectories_are_spread_evenly_and_stay_where_they_are():
    pool, _, _ = _pool(3)

    async def scenario():
        with ExitStack() as stack:
            leases = [stack.enter_context(pool.lease()) for _ in range(7)]
            first = [await _turn(lease) for lease in leases]
            assert sorted(pool.loads) == [2, 2, 3]
            assert [await _turn(lease) for lease in leases] == first
        assert pool.loads == [0, 0, 0]

    asyncio.run(scenario())


@pytest.mark.parametrize("first", [0, 1, 2])
def test_workers_prefer_different_engines_when_all_are_idle(first):
    pool, _, _ = _pool(3, first=first)

    async def scenario():
        with pool.lease() as lease:
            return await _turn(lease)

    assert asyncio.run(scenario()) == first


def test_a_turn_of_a_dead_engine_is_asked_for_again_elsewhere_with_the_same_tokens_and_seed():
    pool, engines, incidents = _pool(2)
    engines[0].is_dead = True

    async def scenario():
        with pool.lease() as lease:
            return await _turn(lease), await _turn(lease)

    assert asyncio.run(scenario()) == (1, 1)
    assert engines[0].asked == engines[1].asked[:1] and len(engines[1].asked) == 2
    assert pool.loads == [0, 0]
    counts, notes = incidents.take()
    assert counts == {"turns_resubmitted": 1} and "engine 0 is lost" in notes[0]
    assert incidents.take() == ({}, [])


def test_a_turn_of_an_engine_that_hangs_is_asked_for_again_once_it_is_given_up():
    pool, engines, incidents = _pool(2)

    class Hanging(Mortal):
        given_up = None

        async def generate(self, token_ids, sampling):
            self.asked.append((token_ids, sampling))
            await self.given_up.wait()
            raise EngineLost("ended by the fleet")

    async def scenario():
        hanging = Hanging(7)
        hanging.given_up = asyncio.Event()
        pool.replace(0, hanging)
        with ExitStack() as stack:
            leases = [stack.enter_context(pool.lease()) for _ in range(4)]
            turns = [asyncio.create_task(_turn(lease)) for lease in leases]
            await asyncio.sleep(0.01)
            assert [turn.done() for turn in turns] == [False, True, False, True]
            hanging.given_up.set()
            return await asyncio.gather(*turns), len(hanging.asked), len(engines[1].asked)

    assert asyncio.run(scenario()) == ([1, 1, 1, 1], 2, 4)
    assert incidents.take()[0] == {"turns_resubmitted": 2} and pool.loads == [0, 0]


def test_a_pool_may_begin_with_an_engine_that_is_not_there_yet():
    pool = EnginePool([None, None], Incidents())

    async def scenario():
        with pool.lease() as lease:
            turn = asyncio.create_task(_turn(lease))
            await asyncio.sleep(0.01)
            assert not turn.done()
            pool.replace(1, Mortal(9))
            return await turn

    assert asyncio.run(scenario()) == 9


def test_with_every_engine_dead_turns_wait_for_the_replacement():
    pool, engines, incidents = _pool(1)
    engines[0].is_dead = True

    async def scenario():
        with ExitStack() as stack:
            leases = [stack.enter_context(pool.lease()) for _ in range(4)]
            turns = [asyncio.create_task(_turn(lease)) for lease in leases]
            await asyncio.sleep(0.01)
            assert not any(turn.done() for turn in turns)
            pool.replace(0, Mortal(9))
            return await asyncio.gather(*turns)

    assert asyncio.run(scenario()) == [9, 9, 9, 9]
    assert incidents.take()[0] == {"turns_resubmitted": 4}


def test_a_late_error_of_the_old_engine_does_not_condemn_the_new_one():
    pool, engines, _ = _pool(1)

    async def scenario():
        with pool.lease() as lease:
            await _turn(lease)
            engines[0].is_dead = True
            turn = asyncio.create_task(_turn(lease))
            await asyncio.sleep(0)  # asked of the old one, which has not answered yet
            pool.replace(0, Mortal(9))
            return await turn

    assert asyncio.run(scenario()) == 9
