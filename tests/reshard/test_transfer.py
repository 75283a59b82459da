"""Weight transfer from a tensor- and pipeline-parallel trainer into real vLLM engines.

Layers: gloo ranks, Ray, one engine; the engine's logprobs against transformers' on weights gathered
from the trainer. One layout by default, the others are slow. The plan: test_plan.py; transports and
faults in transit: test_transports.py; under load: test_transfer_under_load.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.helpers.families import FAMILIES
from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny import write_model_with_weights
from tests.reshard.real import Oracle, build_trainable, change, control_of, start_engine

pytest.importorskip("vllm", reason="engines are vLLM's")

pytestmark = [pytest.mark.dist, pytest.mark.timeout(500)]
NUM_TRANSFERS = 20


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer")
    student = write_model_with_weights(folder / "student", seed=3)
    parallel = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    return run_on_ranks(4, _transfers, str(student), parallel, 1, True, "auto")[0]


def test_engine_equals_transformers_after_each_of_twenty_transfers(outcome):
    assert len(outcome["errors"]) == NUM_TRANSFERS
    assert max(outcome["errors"]) < 1e-4
    assert min(outcome["changes"]) > 0.01, "the weights did not change enough to see a stale copy"


def test_engine_equals_trainer_after_each_transfer(outcome):
    assert max(outcome["canary_errors"]) < 1e-4


def test_stale_tied_head_is_caught_and_named_when_the_refresh_is_removed(outcome):
    assert "prepacked copy is stale" in outcome["stale_head"], outcome["stale_head"]
    assert "lm_head.weight" in outcome["stale_head"]


def test_a_permuted_query_shard_is_caught_and_named(outcome):
    expected = "checksums of model.layers.1.self_attn.q_proj.weight"
    assert expected in outcome["permuted"], outcome["permuted"]


def test_an_engine_that_may_hold_half_a_model_serves_nothing_until_a_transfer_succeeds(outcome):
    assert "serves nothing" in outcome["broken"], outcome["broken"]
    assert outcome["repaired"] < 1e-4


LAYOUTS = {
    "untied-tp1": ("qwen3_untied", {}, 1, "shared_memory"),
    "tied-tp2": ("qwen3", {}, 2, "auto"),
    "untied-tp2-p2p": ("qwen3_untied", {}, 2, "p2p"),
    "experts-tp1": ("qwen3_moe", {"sequence_parallel": True}, 1, "auto"),
    "experts-tp2-ep2": (
        "qwen3_moe",
        {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1,
         "sequence_parallel": True},
        2,
        "auto",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_engine_equals_transformers_in_every_layout(tmp_path, layout):
    family, options, engine_tp, backend = LAYOUTS[layout]
    sizes = dict(FAMILIES[family])
    if "moe_intermediate_size" in sizes:
        sizes["moe_intermediate_size"] = 32 * engine_tp  # vLLM pads narrower experts on CPU
    student = write_model_with_weights(tmp_path / "student", seed=3, **sizes)
    parallel = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, **options}
    found = run_on_ranks(4, _transfers, str(student), parallel, engine_tp, False, backend)[0]
    assert len(found["errors"]) == NUM_TRANSFERS
    assert max(found["errors"]) < 1e-4 and min(found["changes"]) > 0.01


def _transfers(path: str, parallel: dict, engine_tp: int, with_faults: bool, backend: str) -> dict:
    """Twenty transfers of changing weights, then deliberate faults."""
    from megatron_sod.config.schema import ParallelConfig, TransferConfig
    from megatron_sod.errors import WeightTransferError
    from megatron_sod.model.weights import gather_hf_tensors
    from megatron_sod.reshard.canary import canary_sequences, trainer_logprobs
    from megatron_sod.reshard.sync import WeightSync
    from megatron_sod.rollout.ray_instance import stop_ray

    trainable, geometry = build_trainable(path, ParallelConfig(**parallel))
    canaries = canary_sequences(geometry.vocab_size, 24)
    is_main = dist.get_rank() == 0
    engine = start_engine(path, tp=engine_tp) if is_main else None
    control = control_of(engine, tp=engine_tp) if is_main else None
    oracle = Oracle(path) if is_main else None

    def sync(**options) -> WeightSync:
        return WeightSync(
            trainable.model,
            geometry,
            control,
            config=TransferConfig(
                backend=backend, canary_tolerance=1e-4, timeout_s=60, keep_sent=False
            ),
            canaries=canaries,
            trainer_logprobs=lambda ids: trainer_logprobs(trainable.model, ids),
            **options,
        )

    def engine_error() -> tuple[float, torch.Tensor]:
        tensors = {n: t.clone() for n, t in gather_hf_tensors(trainable.model, geometry)}
        if not is_main:
            return 0.0, torch.zeros(1)
        expected = oracle.logprobs(tensors, canaries)
        found = torch.tensor([x for row in control.score(canaries)[0] for x in row])
        return float((found - expected).abs().max()), expected

    def fault(broken: WeightSync, version: int) -> str:
        try:
            broken.transfer(version)
        except WeightTransferError as error:
            return str(error)
        return ""

    result: dict = {"errors": [], "canary_errors": [], "changes": []}
    good, before = sync(), None
    for version in range(NUM_TRANSFERS):
        report = good.transfer(version)
        error, logprobs = engine_error()
        result["canary_errors"].append(report.canary_max_error)
        result["errors"].append(error)
        if before is not None:
            result["changes"].append(float((logprobs - before).abs().max()))
        before = logprobs
        change(trainable.model, seed=version)
    if with_faults:
        result["stale_head"] = fault(sync(refresh_tied_head=False), 20)
        result["permuted"] = fault(_permuting(sync()), 21)
        result["broken"] = _refusal(control, canaries) if is_main else ""
        repairing = sync()
        repairing.transfer(22)
        result["repaired"] = engine_error()[0]
    dist.barrier()
    if is_main:
        stop_ray()
    dist.barrier()
    return result


def _permuting(sync):
    """Rows of layer 1's queries swapped on the way, after their checksums were taken."""
    pack = sync._sender._pack

    def permuted(message, buffer):
        pack(message, buffer)
        offset = 0
        for copy in message.copies:
            size = copy.num_elements * 4
            if copy.hf_name == "model.layers.1.self_attn.q_proj.weight":
                part = buffer[offset : offset + size].view(torch.float32).view(copy.shape)
                part.copy_(part.flip(0).clone())
            offset += -(-size // 64) * 64

    sync._sender._pack = permuted
    return sync


def _refusal(control, canaries) -> str:
    try:
        control.score(canaries)
    except Exception as error:
        return str(error)
    return ""
