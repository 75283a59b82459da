"""A whole transfer in one process: every trainer rank and every engine worker is a thread."""

import threading

import torch
import torch.distributed as dist

from megatron_sod.convert.layout import hf_shapes, segments_of
from megatron_sod.model.geometry import Geometry
from megatron_sod.reshard.layouts import EngineLayout, TrainerLayout
from megatron_sod.reshard.receive import ShardReceiver
from megatron_sod.reshard.send import ShardSender, index_shards
from megatron_sod.reshard.setup import TransferSetup
from tests.reshard.oracles import TINY, TINY_MOE, parameters_of

CPU = torch.device("cpu")


class Memory:
    """A destination that keeps everything; one tensor is live, as norms are in an engine."""

    def __init__(self, live: str | None = None):
        self.values, self.opened, self._live = {}, 0, live
        self.most_open = 0

    def open(self, tensor):
        self.opened += 1
        self.most_open = max(self.most_open, self.opened)
        if tensor.name == self._live:
            return self.values.setdefault(tensor.name, torch.zeros(tensor.shape))
        return torch.zeros(tensor.shape)

    def close(self, tensor, values):
        self.opened -= 1
        self.values[tensor.name] = values


def setup_of(tmp_path, backend, geometry, trainer, engine, **options) -> TransferSetup:
    fields: dict = dict(dtype="float32", bucket_bytes=1 << 14, timeout_s=20.0) | options
    if backend == "kept":
        backend, fields["is_kept"] = "shared_memory", True
    if backend == "p2p":
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        fields |= {"address": "127.0.0.1", "port": store.port, "name": "test"}
        _stores.append(store)
    else:
        fields["folder"] = str(tmp_path)
    return TransferSetup(geometry, trainer, engine, backend=backend, **fields)


_stores: list = []


def weights_of(geometry, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) for n, s in hf_shapes(geometry).items()}


def shards_of(rank, geometry, trainer, weights):
    """The rank's Megatron parameters, padding rows filled with a number that must not travel."""
    for name, split in parameters_of(rank, geometry, trainer):
        for s in segments_of(name, geometry, **split):
            yield s, weights[s.hf_name].narrow(s.dim, s.hf_start, s.length).clone()


def transfer(setup: TransferSetup, weights, *, tamper=None, times=1, models=None):
    """One thread per rank; returns the errors by rank and the engines' memories."""
    trainer, engine = setup.trainer, setup.engine
    models = models or [Memory() for _ in range(engine.num_destinations)]
    errors: dict[str, Exception] = {}
    ready = threading.Barrier(trainer.world_size + engine.num_destinations)
    linked = threading.Barrier(trainer.world_size + engine.num_destinations)

    def guard(name, work):
        def run():
            try:
                work()
            except Exception as error:
                errors[name] = error

        return threading.Thread(target=run, daemon=True)

    def send(rank):
        shards = index_shards(shards_of(rank, setup.geometry, trainer, weights))
        sender = ShardSender(setup, rank, shards, CPU)
        if setup.backend != "p2p":  # links exist before they are opened; groups are joined together
            linked.wait(60)
        ready.wait(60)
        if tamper is not None:
            tamper(rank, sender)
        for _ in range(times):
            sender.send()

    def receive(destination):
        if setup.backend != "p2p":  # links exist before they are opened; groups are joined together
            linked.wait(60)
        receiver = ShardReceiver(setup, destination, CPU)
        ready.wait(60)
        for number in range(times):
            receiver.receive(models[destination], number)

    threads = [guard(f"trainer {r}", lambda r=r: send(r)) for r in range(trainer.world_size)]
    threads += [
        guard(f"engine {d}", lambda d=d: receive(d)) for d in range(engine.num_destinations)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
        assert not thread.is_alive(), "a rank hangs"
    return errors, models


CASES = {
    "dense": (Geometry(**TINY), TrainerLayout(4, 8, tp_size=2, pp_size=2), EngineLayout(2)),
    "tied": (
        Geometry(**TINY | {"tied_embeddings": True}),
        TrainerLayout(2, 8, tp_size=2),
        EngineLayout(1, num_engines=2),
    ),
    "experts": (
        Geometry(**TINY_MOE),
        TrainerLayout(4, 8, tp_size=2, pp_size=1, ep_size=2, expert_tp_size=1),
        EngineLayout(2),
    ),
}
