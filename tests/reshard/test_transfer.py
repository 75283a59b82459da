"""Weight transfer from two tensor-parallel trainer ranks into a real vLLM engine.

Layers: gloo ranks, Ray, one engine. The pieces themselves are tested in test_manifest.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny import write_model_with_weights

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer")
    student = write_model_with_weights(folder / "student", seed=3)
    return run_on_ranks(2, _transfers, str(student))[0]


def test_engine_equals_trainer_after_each_transfer_with_changed_weights(outcome):
    assert len(outcome["errors"]) == 3
    assert max(outcome["errors"]) < 1e-4
    assert outcome["changed"] > 0.01, "the weights did not change enough to notice a stale copy"


def test_stale_tied_head_is_caught_when_the_work_around_is_removed(outcome):
    assert "do not hold the trainer's weights" in outcome["stale_head"]


def test_a_permuted_tensor_is_caught(outcome):
    assert "do not hold the trainer's weights" in outcome["permuted"]


def _transfers(student_path: str) -> dict:
    """Three honest transfers, one with a permuted tensor, one without the tied-head work-around."""
    from megatron_sod.config.schema import ParallelConfig
    from megatron_sod.errors import WeightTransferError
    from megatron_sod.model.build import build_model
    from megatron_sod.model.geometry import load_geometry
    from megatron_sod.model.weights import load_hf_weights
    from megatron_sod.parallel import state
    from megatron_sod.reshard.canary import canary_sequences, trainer_logprobs
    from megatron_sod.reshard.sync import WeightSync
    from megatron_sod.rollout.ray_instance import stop_ray

    parallel = ParallelConfig(tensor_model_parallel_size=2)
    state.initialize(parallel, seed=0)
    geometry = load_geometry(student_path)
    model = build_model(geometry, parallel, state.process_groups())
    load_hf_weights(model, geometry, student_path)
    canaries = canary_sequences(geometry.vocab_size, 24)
    control = _engine_control(student_path) if dist.get_rank() == 0 else None

    def sync(**options) -> WeightSync:
        return WeightSync(
            model,
            geometry,
            control,
            canaries=canaries,
            trainer_logprobs=lambda ids: trainer_logprobs(model, ids),
            tolerance=1e-4,
            **options,
        )

    def error_of(broken: WeightSync, version: int) -> str:
        try:
            broken.transfer(version)
        except WeightTransferError as error:
            return str(error)
        return ""

    result: dict = {"errors": []}
    before = trainer_logprobs(model, canaries)
    good = sync()
    for version in range(3):
        result["errors"].append(good.transfer(version).canary_max_error)
        _change(model, seed=version)
    after = trainer_logprobs(model, canaries)
    result["changed"] = float((torch.tensor(before) - torch.tensor(after)).abs().max())
    result["stale_head"] = error_of(sync(refresh_tied_head=False), 3)
    permuted = sync()
    publish = permuted._pieces.publish
    permuted._pieces.publish = lambda views: publish([v.flip(0) for v in views])
    result["permuted"] = error_of(permuted, 4)
    if dist.get_rank() == 0:
        stop_ray()
    dist.barrier()
    return result


def _change(model, *, seed: int) -> None:
    """Different weights, as after an optimizer step; replicated tensors stay replicated."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            factor = 1.0 + 0.2 * torch.rand((), generator=generator)
            parameter.mul_(factor)


def _engine_control(student_path: str):
    import ray

    from megatron_sod.reshard.sync import EngineControl
    from megatron_sod.rollout.engine import Engine, engine_environment
    from megatron_sod.rollout.ray_instance import start_ray

    start_ray()
    options = {
        "model": student_path,
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_seqs": 4,
        "tensor_parallel_size": 1,
        "gpu_memory_utilization": 0.5,
        "load_format": "dummy",
        "seed": 0,
    }
    environment = {"env_vars": engine_environment(1)}
    actor = ray.remote(num_cpus=0, runtime_env=environment, max_concurrency=64)(Engine)
    engine = actor.remote(options)
    ray.get(engine.ready.remote(), timeout=300)
    return EngineControl(
        connect=lambda info: ray.get(engine.connect_weights.remote(info), timeout=60),
        update=lambda info, version: ray.get(
            engine.update_weights.remote(info, version), timeout=60
        ),
        score=lambda rows: [[ray.get(engine.score.remote(ids), timeout=60) for ids in rows]],
    )
