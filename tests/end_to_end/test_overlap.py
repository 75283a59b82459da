"""Rollouts one iteration ahead, carried over, replayed, taken back; a run without its sandbox.

Layers: real runs of two ranks with the demo's models, checked from their files. The importance
weights themselves: tests/scoring, tests/train; the accounts: tests/rollout.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sod.observe.watchdog import SIGNALS
from megatron_sod.rollout.recording import Recording
from tests.helpers.gloo import free_port
from tests.helpers.launch import end, marker_of, processes_of, run, start

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900)]
ITERATIONS, BATCH, GROUP = 4, 4, 4


def _arguments(run_dir: Path, *overrides: str) -> list[str]:
    return [
        "--config",
        "configs/demo_cpu.yaml",
        "name=overlap",
        f"observe.run_dir={run_dir}",
        f"data.train=[tiny_world:train:{BATCH * ITERATIONS + 8}]",
        "data.eval=[]",
        "eval.teacher=false",
        f"train.num_iterations={ITERATIONS}",
        f"train.train_batch_size={BATCH}",
        "train.ppo_mini_batch_size=2",
        "train.lr_warmup_steps=0",
        f"rollout.num_generations={GROUP}",
        "rollout.timeout_s=200",
        *overrides,
    ]


def _train(run_dir: Path, *overrides: str) -> list[dict]:
    log = run_dir.parent / f"{run_dir.name}.log"
    run("train_sod.py", *_arguments(run_dir, *overrides), nproc=2, log=log, timeout_s=400)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]


def _versions(run_dir: Path) -> list[set[int]]:
    """Versions of the weights that sampled each iteration's tokens."""
    recording = Recording(run_dir / "rollouts")
    return [
        {v for t in recording.read(i) for v in t.policy_versions if v >= 0}
        for i in range(1, ITERATIONS + 1)
    ]


def _check_each_trained_once(run_dir: Path) -> None:
    recording = Recording(run_dir / "rollouts")
    seen = [t.trajectory_id for i in range(1, ITERATIONS + 1) for t in recording.read(i)]
    assert len(seen) == len(set(seen)) == ITERATIONS * BATCH * GROUP
    prompts = [name.rsplit("/", 2)[0] for name in seen]
    assert all(prompts.count(prompt) == GROUP for prompt in prompts)


@pytest.fixture(scope="module")
def ahead(tmp_path_factory) -> tuple[Path, list[dict]]:
    run_dir = tmp_path_factory.mktemp("ahead") / "run"
    overrides = ["rollout.max_staleness=1", "rollout.record=true"]
    overrides += ["train.save_interval=2", "train.keep_last=9"]
    return run_dir, _train(run_dir, *overrides)


def test_rollouts_ahead_are_one_version_behind_and_corrected(ahead):
    run_dir, rows = ahead
    assert [row["iteration"] for row in rows] == list(range(1, ITERATIONS + 1))
    assert _versions(run_dir) == [{0}, {0}, {1}, {2}]
    _check_each_trained_once(run_dir)
    # On-policy but for numerics at first, then one update of this demo's large steps away.
    assert rows[0]["actor/importance"] == pytest.approx(1.0, abs=1e-3)
    assert rows[0]["actor/engine_gap"] < 1e-3
    for row in rows[1:]:
        assert row["actor/engine_gap"] > 1e-3
        assert 0.3 < row["actor/importance"] <= row["actor/importance_max"] <= 2.0 + 1e-6
        assert 0 <= row["actor/importance_clipped"] < 0.5


def test_a_replay_of_overlapped_rollouts_trains_to_the_same_bits(ahead):
    run_dir, rows = ahead
    replay_dir = run_dir.parent / "replay"
    replayed = _train(
        replay_dir, "rollout.max_staleness=1", f"rollout.replay={run_dir / 'rollouts'}"
    )
    for before, after in zip(rows, replayed, strict=True):
        for name in before:
            if name.startswith(("actor/", "sod/")):
                assert after[name] == before[name], name
    weights = [(d / "hf/model.safetensors").read_bytes() for d in (run_dir, replay_dir)]
    assert weights[0] == weights[1]


def test_a_resumed_run_trains_on_the_rollout_that_was_ahead_to_the_same_bits(ahead):
    run_dir, rows = ahead
    resumed_dir = run_dir.parent / "resumed"
    checkpoint = run_dir / "checkpoints" / "iter_000002"
    assert (checkpoint / "rollout_ready.parquet").is_file()
    resumed = _train(
        resumed_dir, "rollout.max_staleness=1", "train.keep_last=9", f"train.resume={checkpoint}"
    )
    assert [row["iteration"] for row in resumed] == [3, 4]
    for before, after in zip(rows[2:], resumed, strict=True):
        for name in before:
            if name.startswith(("actor/", "sod/", "tool/")):
                assert after[name] == before[name], name
    weights = [(d / "hf/model.safetensors").read_bytes() for d in (run_dir, resumed_dir)]
    assert weights[0] == weights[1]


def test_groups_carried_over_finish_with_newer_weights_and_are_trained_once(tmp_path):
    run_dir = tmp_path / "run"
    rows = _train(run_dir, "rollout.partial_prompts=3", "rollout.record=true")
    _check_each_trained_once(run_dir)
    assert [row["rollout/carried"] for row in rows] == [3, 3, 3, 0]
    recording = Recording(run_dir / "rollouts")
    for iteration in range(1, ITERATIONS + 1):
        for trajectory in recording.read(iteration):
            drawn = int(trajectory.trajectory_id.split("/")[1])
            assert drawn in (iteration, iteration - 1)
            versions = [v for v in trajectory.policy_versions if v >= 0]
            assert versions == sorted(versions) and set(versions) <= {drawn - 1, iteration - 1}
    mixed = [t for i in (2, 3, 4) for t in recording.read(i) if t.is_mixed_version]
    assert mixed, "no trajectory was interrupted: the test shows nothing"


def test_after_a_rollback_the_rollout_ahead_is_thrown_away_and_the_next_is_on_policy(tmp_path):
    """Entropy "falls" from iteration 3 on, by a bound nothing can meet: the run goes back to 2,
    does 3 again and then stops."""
    run_dir, log = tmp_path / "run", tmp_path / "run.log"
    others = {signal.key for signal in SIGNALS} - {"min_entropy_share"}
    process = start(
        "train_sod.py",
        *_arguments(
            run_dir,
            "rollout.max_staleness=1",
            "rollout.record=true",
            "train.save_interval=1",
            "train.keep_last=9",
            "watchdog.action=rollback",
            "watchdog.max_rollbacks=1",
            "watchdog.patience=1",
            "watchdog.baseline_iterations=2",
            "watchdog.min_entropy_share=1000",
            *(f"watchdog.{key}=null" for key in others),
        ),
        nproc=2,
        log=log,
    )
    try:
        assert process.wait(timeout=400) != 0
    finally:
        end(process)
    text = log.read_text()
    assert "back to iteration 2" in text and "training looks like it is collapsing" in text
    size = BATCH * GROUP
    assert f"{size} trajectories rolled out ahead by weights that were taken back" in text
    (taken_back,) = map(json.loads, (run_dir / "metrics.rolled_back.jsonl").open())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    assert [row["iteration"] for row in rows] == [1, 2, 3] and taken_back["iteration"] == 3
    assert [row["rollout/discarded"] for row in rows] == [0, 0, size]
    assert taken_back["actor/engine_gap"] > 1e-3, "it was one version behind"
    assert rows[2]["actor/engine_gap"] < 1e-3, "the engines hold what is trained"
    assert rows[2]["actor/importance"] == pytest.approx(1.0, abs=1e-3)
    recording = Recording(run_dir / "rollouts")
    seen = [recording.read(iteration) for iteration in (1, 2, 3)]
    versions = [{v for t in part for v in t.policy_versions if v >= 0} for part in seen]
    assert versions == [{0}, {0}, {4}], "three updates and the way back"
    prompts = [{t.prompt_id for t in part} for part in seen]
    assert not prompts[2] & (prompts[0] | prompts[1])


def test_a_run_without_its_sandbox_stops_before_the_optimizer_and_leaves_nothing(tmp_path):
    run_dir = tmp_path / "run"
    log = tmp_path / "run.log"
    process = start(
        "train_sod.py",
        *_arguments(
            run_dir,
            "sandbox.kind=sandbox_fusion",
            f"sandbox.url=[127.0.0.1:{free_port()}]",  # where nothing listens
            "sandbox.max_infra_retries=0",
        ),
        nproc=2,
        log=log,
    )
    try:
        assert process.wait(timeout=300) != 0
    finally:
        end(process)
    text = log.read_text()
    assert "nothing was trained on this iteration" in text and "max_infra_error_rate" in text
    assert "rollout 1: sandbox: 127.0.0.1" in text, "the log says what failed"
    assert not (run_dir / "metrics.jsonl").exists() and not (run_dir / "checkpoints").exists()
    assert not processes_of(marker_of(log))
