"""What an engine answers to other processes: its errors, and turns that are interrupted.

Layers: an engine over a vLLM of the test's own (tests/helpers/engine_environment) -> the same in a
Ray actor, whose environment has that vLLM while this process has not. The real vLLM:
test_controller.py, test_lost_actors.py.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from megatron_sod.errors import EngineLost, RolloutError, WeightTransferError
from megatron_sod.rollout.agent_loop import Sampling
from megatron_sod.rollout.engine import Engine

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / "tests" / "helpers" / "engine_environment"
SAMPLING = Sampling(1.0, 1.0, 8, (0,), 3)
OPTIONS = {
    "model": "student",
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": 4,
    "tensor_parallel_size": 1,
    "gpu_memory_utilization": 0.5,
    "load_format": "dummy",
    "seed": 0,
    "transfer_backend": "shared_memory",
    "vocab_size": None,
}
CALLS = {
    "ready": lambda engine: engine.ready(),
    "lifeline": lambda engine: engine.lifeline(),
    "generate": lambda engine: engine.generate([1, 2], SAMPLING),
    "score": lambda engine: engine.score([1, 2]),
    "join": lambda engine: engine.join(None, 0),
    "connect_weights": lambda engine: engine.connect_weights({}, 0),
}


@pytest.fixture
def environment(monkeypatch):
    """This process as one in which engines live."""
    for name in [*_vllm_modules()]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(ENVIRONMENT))
    yield
    for name in [*_vllm_modules()]:
        del sys.modules[name]


def _vllm_modules():
    return (name for name in sys.modules if name.split(".")[0] == "vllm")


@pytest.fixture
def engine(environment):
    return Engine(OPTIONS)


@pytest.mark.parametrize("name", CALLS)
def test_a_dead_core_is_a_lost_engine_whatever_is_asked(engine, name):
    engine._llm.errored = True
    with pytest.raises(EngineLost, match="EngineDeadError: EngineCore encountered an issue"):
        asyncio.run(CALLS[name](engine))


@pytest.mark.parametrize("name", CALLS)
def test_no_exception_of_vllm_leaves_a_living_engine(engine, name):
    engine._llm.failure = "one too many"
    with pytest.raises(RolloutError, match="OddError: one too many") as raised:
        asyncio.run(CALLS[name](engine))
    assert type(raised.value) is RolloutError


def test_an_engine_that_cannot_start_says_why(environment):
    with pytest.raises(RolloutError, match="student: .*OddError: no such model"):
        Engine({**OPTIONS, "max_model_len": -1})


def test_a_failed_transfer_is_told_apart(engine):
    engine._llm.failure = "one too many"
    with pytest.raises(WeightTransferError, match="version 3 failed: one too many"):
        asyncio.run(engine.update_weights({}, 3))
    with pytest.raises(WeightTransferError, match="half a model"):
        asyncio.run(engine.generate([1], SAMPLING))


@pytest.mark.parametrize("after_s", [0.0, 0.3], ids=["while it is registered", "while it samples"])
def test_interrupting_ends_every_turn(engine, after_s):
    async def scenario():
        turns = [asyncio.create_task(engine.generate([1], SAMPLING)) for _ in range(3)]
        await asyncio.sleep(after_s)
        await engine.set_interrupting(True)
        assert all(turn.done() for turn in turns), "nobody has to wait for a turn after it"
        turns.append(asyncio.create_task(engine.generate([1], SAMPLING)))
        return await asyncio.gather(*turns)

    turns = asyncio.run(asyncio.wait_for(scenario(), 10))
    assert [turn.is_interrupted for turn in turns] == [True] * 4


def test_an_engine_that_serves_again_interrupts_nothing(engine):
    async def scenario():
        await engine.set_interrupting(True)
        await engine.set_interrupting(False)
        turn = asyncio.create_task(engine.generate([1], SAMPLING))
        await asyncio.sleep(0.5)
        assert not turn.done()
        turn.cancel()

    asyncio.run(scenario())


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray", reason="engines are ray's actors")
    from megatron_sod.rollout.ray_instance import start_ray, stop_ray

    start_ray()
    yield ray
    stop_ray()


@pytest.fixture
def actor(ray):
    """An engine where vLLM is installed; in this process its exceptions cannot be imported."""
    path = {"PYTHONPATH": f"{ENVIRONMENT}:{ROOT}"}
    actor = ray.remote(num_cpus=0, max_concurrency=8, runtime_env={"env_vars": path})(Engine)
    actor = actor.remote(OPTIONS)
    yield actor
    ray.kill(actor)


def _set(ray, actor, name, value):
    ray.get(actor.__ray_call__.remote(lambda self: setattr(self._llm, name, value)), timeout=120)


@pytest.mark.dist
def test_a_core_that_dies_in_another_environment_is_a_lost_engine_here(ray, actor):
    from megatron_sod.rollout.engine_actor import RayEngine

    _set(ray, actor, "errored", True)
    with pytest.raises(EngineLost, match="EngineDeadError"):
        asyncio.run(RayEngine(actor).generate([1, 2], SAMPLING))
    with pytest.raises(EngineLost, match="EngineDeadError"):
        ray.get(actor.lifeline.remote(), timeout=60)


@pytest.mark.dist
def test_an_error_in_another_environment_is_read_here(ray, actor):
    from megatron_sod.rollout.ray_instance import get

    _set(ray, actor, "failure", "one too many")
    with pytest.raises(RolloutError, match="canary scoring failed .*OddError: one too many"):
        get(actor.score.remote([1, 2]), 60, "canary scoring")


@pytest.mark.dist
def test_an_engine_that_cannot_start_in_another_environment_says_why(ray):
    from megatron_sod.rollout.ray_instance import get

    path = {"PYTHONPATH": f"{ENVIRONMENT}:{ROOT}"}
    actor = ray.remote(num_cpus=0, max_concurrency=8, runtime_env={"env_vars": path})(Engine)
    actor = actor.remote({**OPTIONS, "max_model_len": -1})
    with pytest.raises(RolloutError, match="OddError: no such model"):
        get(actor.ready.remote(), 120, "engine start")
