"""Transfers while sequences are being sampled, and processes killed in the middle of one.

Layers: one gloo rank (two where one is killed), Ray, one engine. Slow.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny import write_model_with_weights
from tests.reshard.real import build_trainable, change, control_of, start_engine

pytest.importorskip("vllm", reason="engines are vLLM's")

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(500)]
NUM_TRANSFERS, NUM_SEQUENCES, NUM_TOKENS = 50, 48, 160


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return str(write_model_with_weights(tmp_path_factory.mktemp("load") / "student", seed=3))


@pytest.fixture(scope="module")
def stop_id(student):
    return json.loads((Path(student) / "config.json").read_text())["eos_token_id"]


@pytest.fixture(scope="module", params=["keep", "wait"])
def turns(request, student):
    return request.param, run_on_ranks(1, _transfers_under_load, student, request.param)[0]


def test_no_sequence_is_lost(turns, stop_id):
    _, (sampled, versions) = turns
    assert len(sampled) >= NUM_SEQUENCES
    for turn in sampled:  # to its end: the last token allowed, or the model's own stop
        assert not turn.is_interrupted
        assert len(turn.token_ids) == NUM_TOKENS or turn.token_ids[-1] == stop_id
    assert versions == list(range(NUM_TRANSFERS))


def test_versions_never_fall_within_a_sequence_and_every_token_has_one(turns):
    _, (sampled, _) = turns
    for turn in sampled:
        assert len(turn.policy_versions) == len(turn.token_ids) == len(turn.logprobs)
        assert turn.policy_versions == sorted(turn.policy_versions)
        assert min(turn.policy_versions) >= 0


def test_kept_sequences_are_marked_as_mixed_and_drained_ones_are_not(turns):
    pause, (sampled, _) = turns
    mixed = sum(len(set(turn.policy_versions)) > 1 for turn in sampled)
    assert (mixed > 0) == (pause == "keep"), f"{mixed} of {len(sampled)} mixed with pause={pause}"


def _sync(trainable, geometry, control, **options):
    from megatron_sod.config.schema import TransferConfig
    from megatron_sod.reshard.sync import WeightSync

    return WeightSync(
        trainable.model,
        geometry,
        control,
        config=TransferConfig(**{"canary_interval": 1000, "timeout_s": 60} | options),
        canaries=[[1, 2, 3]],
        trainer_logprobs=lambda ids: [[0.0] * (len(row) - 1) for row in ids],
    )


def _transfers_under_load(path: str, pause: str):
    """(every sampled turn, versions transferred), with sequences in flight all the time."""
    import ray

    from megatron_sod.config.schema import ParallelConfig
    from megatron_sod.rollout.agent_loop import Sampling
    from megatron_sod.rollout.ray_instance import stop_ray

    trainable, geometry = build_trainable(path, ParallelConfig())
    engine = start_engine(path, max_model_len=256)
    sync = _sync(
        trainable, geometry, control_of(engine, pause=pause), canary_tolerance=1e9, keep_sent=False
    )
    sync.transfer(0)

    def sample(seed: int):
        sampling = Sampling(1.0, 1.0, NUM_TOKENS, (), seed)
        return engine.generate.remote([5, 6, 7 + seed % 50], sampling)

    running = [sample(seed) for seed in range(NUM_SEQUENCES)]
    finished, versions, started = [], [0], len(running)
    for version in range(1, NUM_TRANSFERS):
        change(trainable.model, seed=version)
        versions.append(sync.transfer(version).policy_version)
        done, running = ray.wait(running, num_returns=len(running), timeout=0.05)
        finished += ray.get(done)
        refill = [sample(started + i) for i in range(len(done))]
        started += len(refill)
        running += refill
    finished += ray.get(running, timeout=200)
    assert len(finished) == started
    stop_ray()
    return finished, versions


def test_an_engine_killed_in_mid_transfer_stops_the_run_with_its_name(student):
    message, wall_s = run_on_ranks(1, _kill_engine, student)[0]
    assert "class_name: Engine" in message and wall_s < 60, (message, wall_s)


def _kill_engine(path: str):
    import ray

    from megatron_sod.config.schema import ParallelConfig
    from megatron_sod.errors import WeightTransferError
    from megatron_sod.rollout.ray_instance import stop_ray

    trainable, geometry = build_trainable(path, ParallelConfig())
    engine = start_engine(path)
    sync = _sync(trainable, geometry, control_of(engine), canary_tolerance=1e9, keep_sent=False)
    sync.transfer(0)
    pack, sent = sync._sender._pack, []

    def kill_at_second(message, buffer):
        pack(message, buffer)
        sent.append(message)
        if len(sent) == 2:
            ray.kill(engine)

    sync._sender._pack = kill_at_second
    started = time.monotonic()
    try:
        sync.transfer(1)
        message = ""
    except WeightTransferError as error:
        message = str(error)
    stop_ray()
    return message, time.monotonic() - started


def test_a_trainer_rank_killed_in_mid_transfer_leaves_an_engine_that_serves_nothing(student):
    outcome = _killed_trainer(student)
    assert "engine worker 0 waits for trainer rank 1" in outcome["update"], outcome
    assert "serves nothing" in outcome["score"], outcome


def _killed_trainer(path: str) -> dict:
    """Rank 1 of two kills itself between two messages; this process drives the engine."""
    import tempfile

    import ray
    import torch.multiprocessing as mp

    from megatron_sod.rollout.ray_instance import stop_ray

    engine = start_engine(path)
    outcome: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        setup = _two_rank_setup(path, folder)
        go = context.Event()
        ranks = [
            context.Process(target=_send_and_die, args=(setup.as_dict(), path, rank, go))
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        for rank in range(2):
            _wait_for_file(f"{folder}/{rank}-0.link")
        ray.get(engine.connect_weights.remote({"setup": setup.as_dict()}, 0), timeout=60)
        threading.Timer(0.5, go.set).start()
        for name, call in (
            ("update", engine.update_weights.remote({"policy_version": 1, "transfer": 0}, 1)),
            ("score", engine.score.remote([1, 2, 3])),
        ):
            try:
                ray.get(call, timeout=60)
                outcome[name] = "no error"
            except Exception as error:
                outcome[name] = str(error)
        for process in ranks:
            process.kill()
            process.join()
    stop_ray()
    return outcome


def _two_rank_setup(path: str, folder: str):
    from megatron_sod.model.geometry import load_geometry
    from megatron_sod.reshard.layouts import EngineLayout, TrainerLayout
    from megatron_sod.reshard.setup import TransferSetup

    geometry = load_geometry(path)
    return TransferSetup(
        geometry,
        TrainerLayout(2, geometry.num_layers, tp_size=2),
        EngineLayout(1),
        dtype="float32",
        bucket_bytes=1 << 16,
        backend="shared_memory",
        timeout_s=30,
        folder=folder,
    )


def _send_and_die(setup_fields: dict, path: str, rank: int, go) -> None:
    import torch
    from safetensors.torch import load_file

    from megatron_sod.convert.layout import Segment
    from megatron_sod.reshard.send import ShardSender, index_shards
    from megatron_sod.reshard.setup import TransferSetup

    setup = TransferSetup.from_dict(setup_fields)
    tensors = load_file(f"{path}/model.safetensors")
    shards = [(Segment(n, 0, 0, 0, t.shape[0]), t) for n, t in tensors.items()]
    sender = ShardSender(setup, rank, index_shards(shards), torch.device("cpu"))
    pack, sent = sender._pack, []

    def die_at_third(message, buffer):
        pack(message, buffer)
        sent.append(message)
        if rank == 1 and len(sent) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    sender._pack = die_at_third
    go.wait(60)
    sender.send()


def _wait_for_file(path: str) -> None:
    deadline = time.monotonic() + 60
    while not os.path.exists(path):
        assert time.monotonic() < deadline, path
        time.sleep(0.05)
    time.sleep(0.2)
