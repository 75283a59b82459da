"""The transfer plan over parallel layouts: every element once, the floor in bytes, bounded rounds.

Layer: pure; no weights and no process group. Oracles written literally here: vLLM's fused tensors
by torch.cat, Megatron's rank order by its own RankGenerator, the floor by replication factors.
Bytes through real processes: tests/reshard/test_transports.py and test_transfer.py.
"""

import itertools
import time
from dataclasses import replace

import pytest
import torch

from megatron_sod.convert.layout import hf_shapes, segments_of
from megatron_sod.model.geometry import Geometry
from megatron_sod.reshard.layouts import EngineLayout, TrainerLayout
from megatron_sod.reshard.plan import ReshardPlan
from tests.reshard.oracles import (
    TINY,
    TINY_MOE,
    engine_oracle,
    parameters_of,
    real_geometry,
)

BUCKET = 128 << 20  # elements
REAL = ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B.derived", "Qwen3-8B", "Qwen3-32B")
REAL_MOE = ("Qwen3-30B-A3B", "Qwen3-235B-A22B")


def _trainer(geometry: Geometry, tp=1, pp=1, dp=1, **options) -> TrainerLayout:
    return TrainerLayout(tp * pp * dp, geometry.num_layers, tp_size=tp, pp_size=pp, **options)


def _floor(geometry: Geometry, engine: EngineLayout) -> int:
    """Elements the engines cannot do without: each tensor once per engine, replicated parts once
    per rank that needs them."""
    tp, total = engine.tp_size, 0
    for name, shape in hf_shapes(geometry).items():
        copies = 1
        if "norm" in name or name.endswith("mlp.gate.weight"):
            copies = tp
        elif "k_proj" in name or "v_proj" in name:
            copies = max(1, tp // geometry.num_query_groups)
        total += copies * torch.Size(shape).numel()
    return total * engine.num_engines


def _check_coverage(plan: ReshardPlan) -> None:
    """Each part of each engine tensor is filled once, without gap and without overlap."""
    for destination in range(plan.engine.num_destinations):
        filled: dict[tuple, list[tuple[int, int, str, int]]] = {}
        for message in plan.messages_to(destination):
            for c in message.copies:
                interval = (c.offset, c.offset + c.length, c.hf_name, c.start)
                filled.setdefault((c.tensor, c.expert), []).append(interval)
        for tensor in plan.engine_tensors(destination % plan.engine.tp_size):
            for index, parts in itertools.groupby(tensor.parts, key=lambda part: part[0]):
                got = sorted(filled.pop((tensor.name, index)))
                end = 0
                for _, part in parts:
                    while end < part.local_start + part.length:
                        start, stop, name, source = got.pop(0)
                        assert (start, name) == (end, part.hf_name), (tensor.name, start, end)
                        assert source - start == part.hf_start - part.local_start
                        end = stop
                assert not got, f"{tensor.name} is written twice"
        assert not filled, f"writes to tensors the engine does not have: {list(filled)[:3]}"


def _num_elements(plan: ReshardPlan) -> int:
    return sum(
        message.num_elements
        for destination in range(plan.engine.num_destinations)
        for message in plan.messages_to(destination)
    )


@pytest.mark.parametrize("name", REAL)
def test_real_sizes_move_every_element_once_at_the_floor_over_all_layouts(name):
    geometry = real_geometry(name)
    for tp, pp, engine_tp in itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2, 4, 8)):
        engine = EngineLayout(engine_tp)
        plan = ReshardPlan(geometry, _trainer(geometry, tp, pp), engine, bucket_elements=BUCKET)
        assert _num_elements(plan) == _floor(geometry, engine), (tp, pp, engine_tp)
        if (pp, name) in ((2, "Qwen3-0.6B"), (4, "Qwen3-8B")):
            _check_coverage(plan)


@pytest.mark.parametrize("name", REAL_MOE)
@pytest.mark.parametrize("expert_parallel", [False, True])
def test_real_mixtures_of_experts_move_every_element_once(name, expert_parallel):
    geometry = real_geometry(name)
    engine = EngineLayout(8, expert_parallel=expert_parallel)
    trainer = _trainer(geometry, 4, 2, 2, ep_size=4, expert_tp_size=1)
    plan = ReshardPlan(geometry, trainer, engine, bucket_elements=BUCKET)
    assert _num_elements(plan) == _floor(geometry, engine)
    _check_coverage(plan)


def _tiny_layouts():
    for tp, pp, engine_tp in itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2, 4, 8)):
        yield dict(tp=tp, pp=pp), EngineLayout(engine_tp)
    yield dict(tp=2, pp=2, dp=3), EngineLayout(4, num_engines=3)
    yield dict(tp=2, pp=2, num_chunks=2), EngineLayout(2)
    yield dict(tp=1, pp=4, num_chunks=2, dp=2), EngineLayout(1, num_engines=2)


def _tiny_moe_layouts():
    for ep, etp, expert_parallel in itertools.product((1, 2, 4), (1, 2), (False, True)):
        sizes = dict(tp=2, pp=2, dp=4, ep_size=ep, expert_tp_size=etp)
        yield sizes, EngineLayout(4, expert_parallel=expert_parallel)


def _cases():
    for tied, (sizes, engine) in itertools.product((True, False), _tiny_layouts()):
        yield Geometry(**TINY | {"tied_embeddings": tied}), sizes, engine
    for groups, tp in ((1, 1), (2, 2), (1, 2), (2, 4)):
        # fewer KV heads than engine ranks: replicated there; than trainer ranks: shared
        yield Geometry(**TINY | {"num_query_groups": groups}), dict(tp=tp), EngineLayout(8)
    yield Geometry(**TINY | {"qkv_bias": True, "qk_norm": False}), dict(tp=4), EngineLayout(2)
    for sizes, engine in _tiny_moe_layouts():
        yield Geometry(**TINY_MOE), sizes, engine


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [200, 250, 256])
def test_engines_that_know_fewer_ids_get_the_first_rows_alone(tied, rows):
    """A student with more vocabulary rows than its teacher: its other rows stay where they are."""
    geometry = Geometry(**TINY | {"tied_embeddings": tied, "vocab_size": 300})
    fewer = replace(geometry, vocab_size=rows)
    for tp, engine_tp in itertools.product((1, 2, 4), (1, 2, 4)):
        engine = EngineLayout(engine_tp, vocab_size=rows)
        plan = ReshardPlan(geometry, _trainer(geometry, tp), engine, bucket_elements=BUCKET)
        _check_coverage(plan)
        assert _num_elements(plan) == _floor(fewer, engine)
        ends = [
            copy.start + copy.length
            for destination in range(engine_tp)
            for message in plan.messages_to(destination)
            for copy in message.copies
            if copy.hf_name in ("model.embed_tokens.weight", "lm_head.weight")
        ]
        assert max(ends) == rows


def _weights(geometry: Geometry) -> dict[str, torch.Tensor]:
    """Every element its own number; a misplaced one cannot go unseen."""
    weights, first = {}, 1
    for name, shape in hf_shapes(geometry).items():
        count = torch.Size(shape).numel()
        weights[name] = torch.arange(first, first + count).reshape(shape)
        first += count
    return weights


@pytest.mark.parametrize("bucket", [97, 10**9], ids=["many-rounds", "one-bucket"])
def test_following_the_plan_fills_every_engine_parameter_with_the_right_numbers(bucket):
    for geometry, sizes, engine in _cases():
        if bucket < 10**9 and (sizes.get("tp"), engine.tp_size) not in ((1, 2), (2, 4), (8, 8)):
            continue
        trainer, weights = _trainer(geometry, **sizes), _weights(geometry)
        plan = ReshardPlan(geometry, trainer, engine, bucket_elements=bucket)
        for destination in range(engine.num_destinations):
            rank = destination % engine.tp_size
            live = {t.name: torch.zeros(t.shape).long() for t in plan.engine_tensors(rank)}
            for message in plan.messages_to(destination):
                for c in message.copies:
                    target = live[c.tensor] if c.expert is None else live[c.tensor][c.expert]
                    target = target.narrow(c.dim, c.offset, c.length)
                    assert not target.any(), f"{c.tensor} is written twice"
                    assert target.shape == c.shape
                    target.copy_(weights[c.hf_name].narrow(c.dim, c.start, c.length))
            oracle = engine_oracle(geometry, weights, engine.tp_size, rank, engine.expert_parallel)
            assert live.keys() == oracle.keys()
            for name in oracle:
                assert torch.equal(live[name], oracle[name]), (name, sizes, engine)


def test_every_sender_holds_what_it_is_to_send():
    for geometry, sizes, engine in _cases():
        if sizes["tp"] * sizes.get("pp", 1) * sizes.get("dp", 1) not in (4, 8, 12, 16):
            continue
        trainer = _trainer(geometry, **sizes)
        plan = ReshardPlan(geometry, trainer, engine, bucket_elements=10**9)
        held = {rank: _segments(rank, geometry, trainer) for rank in range(trainer.world_size)}
        for source in range(trainer.world_size):
            for message in plan.messages_from(source):
                for c in message.copies:
                    assert any(
                        s.hf_start <= c.start and c.start + c.length <= s.hf_start + s.length
                        for s in held[source].get(c.hf_name, [])
                    ), (source, c, sizes)


def _segments(rank, geometry, trainer):
    held = {}
    for name, split in parameters_of(rank, geometry, trainer):
        for segment in segments_of(name, geometry, **split):
            held.setdefault(segment.hf_name, []).append(segment)
    return held


def test_senders_and_receivers_expect_the_same_messages_in_the_same_order():
    for geometry, sizes, engine in _cases():
        plan = ReshardPlan(geometry, _trainer(geometry, **sizes), engine, bucket_elements=500)
        sent = [m for r in range(plan.trainer.world_size) for m in plan.messages_from(r)]
        expected = [m for d in range(engine.num_destinations) for m in plan.messages_to(d)]
        assert sorted(sent) == sorted(expected)
        pairs = [m[:3] for m in sent]
        assert len(set(pairs)) == len(pairs), "two messages of one pair in one round"


def test_no_round_brings_a_destination_more_than_a_bucket():
    geometry = Geometry(**TINY_MOE)
    trainer = _trainer(geometry, 2, 2, 2, ep_size=2, expert_tp_size=1)
    for bucket in (24, 100, 1000, 50_000):
        plan = ReshardPlan(geometry, trainer, EngineLayout(2), bucket_elements=bucket)
        received: dict[tuple[int, int], int] = {}
        for destination in range(2):
            for m in plan.messages_to(destination):
                key = (m.round, destination)
                received[key] = received.get(key, 0) + m.num_elements
        assert max(received.values()) <= bucket


def test_replicas_of_the_weights_share_the_sending():
    geometry = Geometry(**TINY)
    plan = ReshardPlan(
        geometry, _trainer(geometry, 2, 2, 4), EngineLayout(4, 4), bucket_elements=10**9
    )
    sent = [sum(m.num_elements for m in plan.messages_from(r)) for r in range(16)]
    for stage in (sent[:8], sent[8:]):
        assert max(stage) < 1.3 * min(stage), stage


def test_a_tied_head_travels_once_and_an_untied_one_too():
    for tied, names in ((True, ["model.embed_tokens"]), (False, ["lm_head", "model.embed_tokens"])):
        geometry = Geometry(**TINY | {"tied_embeddings": tied})
        plan = ReshardPlan(geometry, _trainer(geometry, 2), EngineLayout(2), bucket_elements=10**9)
        copies = [c for d in range(2) for m in plan.messages_to(d) for c in m.copies]
        found = sorted({c.tensor for c in copies if c.width == 24 and "layers" not in c.tensor})
        assert found == [f"{name}.weight" for name in names]


def test_padding_of_either_side_never_travels():
    geometry = Geometry(**TINY)  # 389 rows; Megatron pads to 512 at TP 2, vLLM to 448
    for tp, engine_tp in itertools.product((1, 2, 4), (1, 2, 4, 8)):
        plan = ReshardPlan(
            geometry, _trainer(geometry, tp), EngineLayout(engine_tp), bucket_elements=10**9
        )
        rows = [
            (c.start, c.start + c.length)
            for d in range(engine_tp)
            for m in plan.messages_to(d)
            for c in m.copies
            if c.hf_name == "lm_head.weight"
        ]
        assert max(stop for _, stop in rows) == 389
        assert sum(stop - start for start, stop in rows) == 389


def test_segment_counts_stay_small():
    """One copy per contiguous run; equal layouts need one per tensor part and KV group."""
    geometry = Geometry(**TINY)
    plan = ReshardPlan(geometry, _trainer(geometry, 2), EngineLayout(2), bucket_elements=10**9)
    per_layer = [c for m in plan.messages_to(0) for c in m.copies if "layers.3." in c.tensor]
    # 4 norms, o_proj, down, gate, up, and q, k, v of each of this rank's 4 KV groups
    assert len(per_layer) == 4 + 4 + 3 * 4


def test_the_largest_model_is_planned_in_seconds():
    """235B-A22B, 64 trainer ranks to 4 engines of 8: one rank's plan, and the whole of it."""
    geometry = real_geometry("Qwen3-235B-A22B")
    trainer = _trainer(geometry, 4, 2, 8, ep_size=8, expert_tp_size=1)
    started = time.process_time()
    plan = ReshardPlan(geometry, trainer, EngineLayout(8, num_engines=4), bucket_elements=BUCKET)
    mine = sum(m.num_elements for m in plan.messages_from(17))
    theirs = sum(m.num_elements for m in plan.messages_to(5))
    assert mine > 0 and theirs > 0
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"world_size": 6, "num_layers": 8, "tp_size": 4}, "does not divide world size 6"),
        ({"world_size": 8, "num_layers": 7, "pp_size": 2}, "do not divide 7 layers"),
        ({"world_size": 4, "num_layers": 8, "ep_size": 8}, "expert tensor parallel size 8"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        TrainerLayout(**sizes)


def test_a_part_nobody_holds_is_named():
    geometry = Geometry(**TINY | {"ffn_hidden_size": 130})
    with pytest.raises(ValueError, match=r"no trainer rank holds.*(gate|up|down)_proj"):
        # 130 columns over 4 ranks: integer division drops two of them
        ReshardPlan(geometry, _trainer(geometry, 4), EngineLayout(2), bucket_elements=100)
