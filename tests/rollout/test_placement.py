"""Every engine has GPUs of its own, on one machine.

Layers: arithmetic. Engines on GPUs have not been started by this project: docs/benchmarks/gpu.md.
"""

import pytest

from megatron_sod.config.schema import ClusterConfig, ParallelConfig, RolloutConfig
from megatron_sod.errors import ConfigError
from megatron_sod.plan.roles import trainer_roles
from megatron_sod.rollout.placement import EnginePlace, engine_places


def _places(nodes: int, gpus: int, size: int, count: int, placement: str = "colocated"):
    return engine_places(
        ClusterConfig(num_nodes=nodes, gpus_per_node=gpus),
        RolloutConfig(
            placement=placement, engine={"tensor_parallel_size": size, "num_engines": count}
        ),
    )


def test_eight_engines_of_one_gpu_fill_a_machine():
    assert _places(1, 8, 1, 8) == [EnginePlace(0, (i,)) for i in range(8)]


def test_engines_go_on_to_the_next_machine_and_never_straddle_two():
    assert _places(2, 4, 2, 3) == [
        EnginePlace(0, (0, 1)),
        EnginePlace(0, (2, 3)),
        EnginePlace(1, (0, 1)),
    ]
    assert _places(2, 3, 2, 2) == [EnginePlace(0, (0, 1)), EnginePlace(1, (0, 1))]


@pytest.mark.parametrize(("nodes", "gpus", "size", "count"), [(1, 4, 2, 3), (2, 2, 4, 1)])
def test_colocated_engines_that_do_not_fit_are_refused(nodes, gpus, size, count):
    with pytest.raises(ConfigError, match="do not fit .* lower rollout.engine.num_engines"):
        _places(nodes, gpus, size, count)


def test_engines_apart_follow_the_trainers_gpus_on_every_machine():
    assert _places(2, 4, 2, 3, "disaggregated") == [
        EnginePlace(0, (4, 5)),
        EnginePlace(0, (6, 7)),
        EnginePlace(1, (4, 5)),
    ]


def test_no_gpu_serves_two_engines():
    for count in range(1, 9):
        for placement in ("colocated", "disaggregated"):
            taken = [
                (place.machine, device)
                for place in _places(4, 4, 2, count, placement)
                for device in place.devices
            ]
            assert len(set(taken)) == len(taken) == 2 * count


def test_the_plan_draws_engines_where_they_start():
    cluster = ClusterConfig(num_nodes=2, gpus_per_node=4)
    rollout = RolloutConfig(engine={"tensor_parallel_size": 2, "num_engines": 3})
    roles = trainer_roles(cluster, ParallelConfig(), rollout=rollout)
    for number, place in enumerate(engine_places(cluster, rollout)):
        ranks = [role.rank for role in roles if role.engine == number]
        assert ranks == [place.machine * 4 + device for device in place.devices]


def test_an_engines_own_gpus_come_first_and_the_trainers_stay_visible():
    """vLLM takes the first; CUDA IPC can only map memory of GPUs the process sees."""
    assert EnginePlace(0, (2, 3)).visible_devices(4) == "2,3,0,1"
    assert EnginePlace(0, (4,)).visible_devices(2) == "4,0,1"


def test_renumbered_gpus_keep_their_names():
    assert EnginePlace(0, (1,)).visible_devices(2, ["6", "7"]) == "7,6"
    with pytest.raises(ConfigError, match="lists 2 GPUs.*need GPU 2 too"):
        EnginePlace(0, (2,)).visible_devices(2, ["6", "7"])
