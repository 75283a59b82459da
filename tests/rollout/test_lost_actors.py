"""Engines and workers that die or hang, among several and in parts: replaced whole, nothing lost.

Layer: the real controller with two engines and two workers, then with an engine over two
tensor-parallel processes and the local sandbox; processes are killed or stopped while they sample.
One engine and one worker killed: test_controller.py; the decisions alone: test_fleet.py,
test_pulse.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import psutil
import pytest

ray = pytest.importorskip("ray", reason="rollouts run on ray")
pytest.importorskip("vllm", reason="rollouts sample with vllm")

from megatron_sod.rollout.worker import make_chat  # noqa: E402
from tests.helpers.flaky_service import FlakyService  # noqa: E402
from tests.helpers.live_rollouts import (  # noqa: E402
    check_accounts,
    load_all_prompts,
    roll_out,
    roll_out_disturbed,
    rollout_config,
    serving_controller,
    wait_until,
)

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(1500)]
SILENCE_TIMEOUT_S = 20.0
SHAPES = {
    "two of each": {"num_workers": 2, "engine": {"num_engines": 2}},
    "tensor parallel": {"engine": {"tensor_parallel_size": 2}},
}


@pytest.fixture(scope="module", params=SHAPES)
def scene(request, tmp_path_factory):
    """Controller, prompts and what an undisturbed rollout gives."""
    service = FlakyService() if request.param == "two of each" else None
    settings = {"silence_timeout_s": SILENCE_TIMEOUT_S, **SHAPES[request.param]}
    config = rollout_config(service.url if service else None, **settings)
    prompts = load_all_prompts(config, make_chat(config, config.student.path))
    with serving_controller(config, tmp_path_factory.mktemp("links")) as controller:
        undisturbed = roll_out(controller, prompts).trajectories
        check_accounts(undisturbed, prompts)
        yield controller, prompts, undisturbed
    if service:
        service.close()


@pytest.fixture
def two_of_each(scene):
    if len(scene[0].fleet.engines) != 2:
        pytest.skip("another shape's test")
    return scene


@pytest.fixture
def tensor_parallel(scene):
    if len(scene[0].fleet.engines) != 1:
        pytest.skip("another shape's test")
    return scene


def _tree(actor) -> list[psutil.Process]:
    """The actor's process and all below it."""
    top = psutil.Process(ray.get(actor.__ray_call__.remote(lambda self: os.getpid())))
    return [top, *top.children(recursive=True)]


def _named(tree, name: str) -> psutil.Process:
    """The one whose command line holds `name`."""
    (found,) = [process for process in tree if name in " ".join(process.cmdline())]
    return found


def _check(scene, result, tree, counts: dict[str, int]) -> None:
    """As if nothing had happened, but for the accounts; of the old processes none is left."""
    _, prompts, undisturbed = scene
    check_accounts(result.trajectories, prompts)
    assert repr(result.trajectories) == repr(undisturbed)
    found = {k: n for k, n in result.counts.items() if k.endswith(("_restarts", "_hangs"))}
    assert found == counts
    wait_until(lambda: not any(map(_lives, tree)), f"left alive: {[*filter(_lives, tree)]}")


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_one_of_two_engines_killed(two_of_each):
    controller, prompts, _ = two_of_each
    tree = _tree(controller.fleet.engines[1])
    result = roll_out_disturbed(controller, prompts, tree[0].kill, engine=1)
    _check(two_of_each, result, tree, {"engine_restarts": 1})
    assert result.counts["turns_resubmitted"] > 0


def test_one_of_two_workers_killed(two_of_each):
    controller, prompts, _ = two_of_each
    tree = _tree(controller.fleet.workers[1])
    result = roll_out_disturbed(controller, prompts, tree[0].kill)
    _check(two_of_each, result, tree, {"worker_restarts": 1})
    assert 0 < result.counts["groups_requeued"] < len(prompts)


def test_an_engine_and_a_worker_killed_at_once(two_of_each):
    """The new worker must not sample from the new engine before that has its weights."""
    controller, prompts, _ = two_of_each
    tree = [*_tree(controller.fleet.engines[0]), *_tree(controller.fleet.workers[0])]

    def kill():
        for process in tree:
            process.kill()

    result = roll_out_disturbed(controller, prompts, kill)
    _check(two_of_each, result, tree, {"engine_restarts": 1, "worker_restarts": 1})


@pytest.mark.parametrize("part", ["ray::", "VLLM::EngineCore"], ids=["actor", "core"])
def test_an_engine_that_hangs_is_ended_and_its_turns_are_asked_for_again(two_of_each, part, capfd):
    controller, prompts, _ = two_of_each
    tree = _tree(controller.fleet.engines[0])
    result = roll_out_disturbed(controller, prompts, _named(tree, part).suspend)
    _check(two_of_each, result, tree, {"engine_restarts": 1, "engine_hangs": 1})
    assert result.counts["turns_resubmitted"] > 0
    log = capfd.readouterr().err
    assert "engine 0 hangs: no sign of life for" in log and "engine 0 serves again" in log


def test_a_worker_that_hangs_is_ended_and_its_groups_start_again(two_of_each):
    controller, prompts, _ = two_of_each
    tree = _tree(controller.fleet.workers[0])
    result = roll_out_disturbed(controller, prompts, tree[0].suspend)
    _check(two_of_each, result, tree, {"worker_restarts": 1, "worker_hangs": 1})
    assert 0 < result.counts["groups_requeued"] < len(prompts)


def test_an_engine_that_only_pauses_is_left_alone(two_of_each):
    controller, prompts, _ = two_of_each
    core = _named(_tree(controller.fleet.engines[0]), "VLLM::EngineCore")

    def pause():
        core.suspend()
        threading.Timer(0.4 * SILENCE_TIMEOUT_S, core.resume).start()

    result = roll_out_disturbed(controller, prompts, pause)
    _check(two_of_each, result, [], {})


def test_a_sandbox_killed_again_and_again_costs_retries_and_no_trajectory(tensor_parallel):
    controller, prompts, _ = tensor_parallel
    worker = _tree(controller.fleet.workers[0])[0]

    def kill_guests():
        for _ in range(4):
            for process in worker.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.2)

    result = roll_out_disturbed(controller, prompts, kill_guests)
    _check(tensor_parallel, result, [], {})
    assert result.counts["sandbox_retries"] > 0, "no call was running: the test shows nothing"


@pytest.mark.parametrize(
    ("number", "counts"),
    [
        (signal.SIGKILL, {"engine_restarts": 1}),
        (signal.SIGSTOP, {"engine_restarts": 1, "engine_hangs": 1}),
    ],
    ids=["killed", "stopped"],
)
def test_an_engine_that_loses_one_tensor_parallel_process_is_replaced_whole(
    tensor_parallel, number, counts
):
    controller, prompts, _ = tensor_parallel
    tree = _tree(controller.fleet.engines[0])
    worker = _named(tree, "VLLM::Worker_TP1")
    assert _named(tree, "VLLM::Worker_TP0") != worker
    result = roll_out_disturbed(controller, prompts, lambda: worker.send_signal(number))
    _check(tensor_parallel, result, tree, counts)
    assert result.counts["turns_resubmitted"] > 0
