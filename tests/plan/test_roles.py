"""Planned coordinates are those Megatron gives the ranks, for every kind of parallelism.

Layers: pure arithmetic on awkward sizes, then Megatron's own groups over 4 gloo ranks.
"""

import pytest

from megatron_sod.config.schema import ClusterConfig, ParallelConfig, RolloutConfig
from megatron_sod.plan.roles import coordinates, trainer_roles
from tests.helpers.gloo import run_on_ranks


def _parallel(tp=1, pp=1, cp=1, ep=1, **other) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        **other,
    )


def _megatron_coordinates(layouts: list[dict]) -> list[tuple]:
    from megatron.core import parallel_state

    from megatron_sod.parallel import state

    found = []
    for layout in layouts:
        state.initialize(_parallel(**layout), seed=0)
        groups = state.process_groups()
        ep = parallel_state.get_expert_model_parallel_rank()
        found.append((groups.tp.rank(), groups.cp.rank(), groups.dp.rank(), groups.pp.rank(), ep))
        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.dist
def test_planned_coordinates_are_megatrons():
    layouts = [{"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}, {"cp": 2}, {"ep": 2}, {"tp": 2, "ep": 2}]
    by_rank = run_on_ranks(4, _megatron_coordinates, layouts)
    for number, layout in enumerate(layouts):
        roles = trainer_roles(ClusterConfig(gpus_per_node=4), _parallel(**layout))
        planned = [(r.tp, r.cp, r.dp, r.pp, r.ep) for r in roles]
        assert planned == [found[number] for found in by_rank], layout


def test_every_rank_of_a_large_job_has_its_own_place():
    parallel = _parallel(tp=4, pp=3, cp=2)
    places = {coordinates(rank, 120, parallel) for rank in range(120)}
    assert len(places) == 120
    assert max(places) == (3, 1, 4, 2)


def test_colocated_engines_share_the_first_ranks_gpus():
    rollout = RolloutConfig(engine={"num_engines": 3, "tensor_parallel_size": 2})
    roles = trainer_roles(ClusterConfig(gpus_per_node=8), _parallel(), rollout=rollout)
    assert [role.engine for role in roles] == [0, 0, 1, 1, 2, 2, None, None]


def test_the_teacher_may_be_cut_into_other_stages():
    roles = trainer_roles(ClusterConfig(gpus_per_node=4), _parallel(pp=2), _parallel(tp=2))
    assert [(role.pp, role.teacher_pp) for role in roles] == [(0, 0), (0, 0), (1, 0), (1, 0)]
