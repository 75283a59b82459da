"""Bytes of a whole transfer between real ends of a transport, and what each fault says.

Layer: one process; every trainer rank and every engine worker is a thread with its own end. The
plan itself: test_plan.py. Through vLLM: test_transfer.py.
"""

import os
from dataclasses import replace

import pytest
import torch

from megatron_sod.errors import WeightTransferError
from megatron_sod.reshard import shared_slots
from megatron_sod.reshard.message import pack
from megatron_sod.reshard.receive import ShardReceiver
from megatron_sod.reshard.send import ShardSender, index_shards
from megatron_sod.reshard.setup import TransferSetup
from tests.reshard.oracles import engine_oracle
from tests.reshard.wire import CASES, CPU, Memory, setup_of, shards_of, transfer, weights_of

pytestmark = pytest.mark.timeout(150)


@pytest.mark.parametrize("backend", ["shared_memory", "kept", "p2p"])
@pytest.mark.parametrize("case", CASES)
def test_every_engine_parameter_arrives_bit_exactly_twice_in_a_row(tmp_path, backend, case):
    geometry, trainer, engine = CASES[case]
    weights = weights_of(geometry)
    setup = setup_of(tmp_path, backend, geometry, trainer, engine)
    errors, models = transfer(setup, weights, times=2)
    assert not errors, errors
    for destination, model in enumerate(models):
        rank = destination % engine.tp_size
        oracle = engine_oracle(geometry, weights, engine.tp_size, rank, False)
        assert model.values.keys() == oracle.keys()
        for name, expected in oracle.items():
            assert torch.equal(model.values[name], expected), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_a_wire_format_other_than_the_engines_is_converted_on_arrival(tmp_path, dtype):
    geometry, trainer, engine = CASES["dense"]
    weights = {n: w.to(getattr(torch, dtype)) for n, w in weights_of(geometry).items()}
    setup = setup_of(tmp_path, "shared_memory", geometry, trainer, engine, dtype=dtype)
    errors, models = transfer(setup, weights)
    assert not errors, errors
    norm = models[1].values["model.norm.weight"]
    assert torch.equal(norm, weights["model.norm.weight"].float())


def _corrupt(hf_name: str, change):
    """Change the packed numbers of one tensor on rank 1, after its checksums were taken."""

    def tamper(rank, sender):
        honest = sender._pack

        def packed(message, buffer):
            honest(message, buffer)
            offset = 0
            for copy in message.copies:
                size = copy.num_elements * 4
                if copy.hf_name == hf_name:
                    part = buffer[offset : offset + size].view(torch.float32)
                    part.copy_(change(part.clone()))
                offset += -(-size // 64) * 64

        if rank == 1:
            sender._pack = packed

    return tamper


@pytest.mark.parametrize("backend", ["shared_memory", "p2p"])
def test_a_permuted_query_shard_is_named(tmp_path, backend):
    geometry, trainer, engine = CASES["dense"]
    setup = setup_of(tmp_path, backend, geometry, trainer, engine, timeout_s=5.0)
    name = "model.layers.1.self_attn.q_proj.weight"
    errors, _ = transfer(setup, weights_of(geometry), tamper=_corrupt(name, lambda x: x.flip(0)))
    assert any(f"checksums of {name}" in str(e) for e in errors.values()), errors


def test_a_dropped_expert_is_named(tmp_path):
    geometry, trainer, engine = CASES["experts"]
    setup = setup_of(tmp_path, "shared_memory", geometry, trainer, engine)
    name = "model.layers.5.mlp.experts.6.up_proj.weight"  # of expert-parallel rank 1
    errors, _ = transfer(setup, weights_of(geometry), tamper=_corrupt(name, torch.zeros_like))
    assert any(f"checksums of {name}" in str(e) for e in errors.values()), errors


def test_a_tensor_the_plan_leaves_out_is_named(tmp_path, monkeypatch):
    geometry, trainer, engine = CASES["experts"]
    setup = setup_of(tmp_path, "shared_memory", geometry, trainer, engine)
    from megatron_sod.reshard.plan import ReshardPlan

    def without(which):
        def messages(self, rank):
            for message in which(self, rank):
                yield message._replace(
                    copies=[c for c in message.copies if ".experts.3.down_proj" not in c.hf_name]
                )

        return messages

    monkeypatch.setattr(ReshardPlan, "messages_to", without(ReshardPlan.messages_to))
    monkeypatch.setattr(ReshardPlan, "messages_from", without(ReshardPlan.messages_from))
    errors, _ = transfer(setup, weights_of(geometry))
    assert "first model.layers.0.mlp.experts.w2_weight" in str(errors["engine 0"])


def test_rows_of_padding_that_leak_are_named(tmp_path):
    geometry, trainer, engine = CASES["tied"]
    setup = setup_of(tmp_path, "shared_memory", geometry, trainer, engine)

    class Leaky(Memory):
        def open(self, tensor):
            values = super().open(tensor)
            if tensor.name == "model.embed_tokens.weight":
                values[-1] = 1.0  # a row beyond the vocabulary: 389 rows of 448
            return values

    errors, _ = transfer(setup, weights_of(geometry), models=[Memory(), Leaky()])
    assert "padding rows 389 to 448 of model.embed_tokens.weight" in str(errors["engine 1"])


def test_a_sender_with_another_layout_is_refused_before_anything_is_sent(tmp_path):
    geometry, trainer, engine = CASES["dense"]
    setup = setup_of(tmp_path, "shared_memory", geometry, trainer, engine)
    other = replace(trainer, pp_size=1, tp_size=4)
    shards = index_shards(shards_of(0, geometry, other, weights_of(geometry)))
    with pytest.raises(WeightTransferError, match="trainer rank 0 is to send .* does not hold"):
        ShardSender(setup, 0, shards, CPU)


def test_an_engine_started_later_reads_what_was_kept(tmp_path):
    geometry, trainer, engine = CASES["dense"]
    setup, weights = setup_of(tmp_path, "kept", geometry, trainer, engine), weights_of(geometry)
    errors, models = transfer(setup, weights, times=2)
    assert not errors
    late = Memory()
    ShardReceiver(setup, 1, CPU).receive(late, 1)
    for name, values in models[1].values.items():
        assert torch.equal(late.values[name], values)


def test_no_more_than_a_module_is_open_at_a_time(tmp_path):
    geometry, trainer, engine = CASES["dense"]
    setup = setup_of(tmp_path, "shared_memory", geometry, trainer, engine, bucket_bytes=1 << 30)
    errors, models = transfer(setup, weights_of(geometry))
    assert not errors
    # Sources of one layer interleave: a parameter is open until each of them has sent its part.
    assert max(model.most_open for model in models) <= 8


def test_an_engine_that_fails_ends_the_senders_at_once(tmp_path):
    geometry, trainer, engine = CASES["dense"]
    setup = setup_of(tmp_path, "shared_memory", geometry, trainer, engine, timeout_s=50)

    class Failing(Memory):
        def close(self, tensor, values):
            raise RuntimeError("no memory left")

    errors, _ = transfer(setup, weights_of(geometry), models=[Failing(), Memory()])
    assert "no memory left" in str(errors["engine 0"])
    assert "gave up" in str(errors["trainer 0"]) and len(errors) == 6


def test_a_silent_peer_is_reported_after_the_timeout(tmp_path):
    link = shared_slots.SlotSender(tmp_path, 3, {1: [64]}, is_kept=False, timeout_s=0.5, device=CPU)
    for _ in range(2):
        link.buffer(1, 64)
        link.post(1)
    with pytest.raises(WeightTransferError, match=r"rank 3 waits for engine worker 1: nothing for"):
        link.buffer(1, 64)


def test_a_dead_peer_is_reported_without_waiting_for_the_timeout(tmp_path):
    sender = shared_slots.SlotSender(
        tmp_path, 0, {0: [64]}, is_kept=False, timeout_s=600, device=CPU
    )
    child = os.fork()
    if child == 0:
        shared_slots.SlotReceiver(tmp_path, 0, {0: [64]}, is_kept=False, timeout_s=600, device=CPU)
        os._exit(0)
    os.waitpid(child, 0)
    sender.buffer(0, 64)
    sender.post(0)
    with pytest.raises(WeightTransferError, match=rf"process {child}\) died"):
        sender.flush()


def test_an_engine_on_another_host_is_told_which_backend_to_use(tmp_path):
    with pytest.raises(WeightTransferError, match="use p2p across hosts"):
        shared_slots.SlotReceiver(
            tmp_path / "x", 0, {0: [64]}, is_kept=False, timeout_s=1, device=CPU
        )


def test_closing_removes_the_links(tmp_path):
    sender = shared_slots.SlotSender(
        tmp_path, 0, {0: [64], 1: [64]}, is_kept=True, timeout_s=1, device=CPU
    )
    assert len(list(tmp_path.iterdir())) == 2
    sender.close()
    assert list(tmp_path.iterdir()) == []


def test_packing_is_deterministic():
    geometry, trainer, engine = CASES["dense"]
    setup = TransferSetup(geometry, trainer, engine, "float32", 1 << 20, "shared_memory", 1.0)
    message = next(setup.plan().messages_from(0))
    weights = weights_of(geometry)
    buffers = []
    for _ in range(2):
        buffer = torch.zeros(1 << 20, dtype=torch.uint8)
        pack(
            message, buffer, lambda c: weights[c.hf_name].narrow(c.dim, c.start, c.length),
            torch.float32,
        )  # fmt: skip
        buffers.append(buffer)
    assert torch.equal(*buffers) and buffers[0].any()


def test_the_setup_survives_a_control_message():
    import json

    geometry, trainer, engine = CASES["experts"]
    setup = TransferSetup(geometry, trainer, engine, "bfloat16", 1 << 20, "p2p", 3.0, name="x")
    assert TransferSetup.from_dict(json.loads(json.dumps(setup.as_dict()))) == setup
