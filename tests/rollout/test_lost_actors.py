"""Engines and workers that die or hang, among several and in parts: replaced whole, nothing lost.

Layer: the real controller with two engines and two workers, with an engine over two
tensor-parallel processes, with the local sandbox; processes are killed or stopped in the middle of
a rollout. One engine and one worker killed: test_controller.py; the decisions alone:
test_fleet.py, test_pulse.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import SimpleNamespace

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
    "local sandbox": {},
}


@pytest.fixture(scope="module")
def scene(request, tmp_path_factory):
    """Controller, prompts, the sandbox's service and what an undisturbed rollout gives."""
    service = FlakyService() if request.param != "local sandbox" else None
    settings = {"silence_timeout_s": SILENCE_TIMEOUT_S, **SHAPES[request.param]}
    config = rollout_config(service.url if service else None, **settings)
    prompts = load_all_prompts(config, make_chat(config, config.student.path))
    with serving_controller(config, tmp_path_factory.mktemp("links")) as controller:
        undisturbed = roll_out(controller, prompts).trajectories
        check_accounts(undisturbed, prompts)
        yield SimpleNamespace(
            controller=controller,
            prompts=prompts,
            service=service,
            undisturbed=undisturbed,
        )
    if service:
        service.close()


@pytest.fixture(autouse=True)
def go_on_after_a_failure():
    """A process left stopped would hang every later test."""
    yield
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def _in(shape: str):
    return pytest.mark.parametrize("scene", [shape], indirect=True)


def _tree(actor) -> list[psutil.Process]:
    """The actor's process and all below it."""
    top = psutil.Process(ray.get(actor.__ray_call__.remote(lambda self: os.getpid())))
    return [top, *top.children(recursive=True)]


def _named(tree, name: str) -> psutil.Process:
    """The one whose command line holds `name`."""
    (found,) = [process for process in tree if name in " ".join(process.cmdline())]
    return found


def _disturbed(scene, disturb):
    """The others may end the rollout before the lost one serves again, so that is waited for."""
    result = roll_out_disturbed(scene.controller, scene.prompts, scene.service, disturb)
    scene.controller.fleet.heal()
    return result


def _check(scene, result, tree, counts: dict[str, int]) -> None:
    """As if nothing had happened, but for the accounts; of the old processes none is left."""
    check_accounts(result.trajectories, scene.prompts)
    assert repr(result.trajectories) == repr(scene.undisturbed)
    found = {k: n for k, n in result.counts.items() if k.endswith(("_restarts", "_hangs"))}
    assert found == counts
    wait_until(lambda: not any(map(_lives, tree)), f"left alive: {[*filter(_lives, tree)]}")


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@_in("two of each")
def test_one_of_two_engines_killed(scene):
    controller = scene.controller
    tree = _tree(controller.fleet.engines[1])
    result = _disturbed(scene, tree[0].kill)
    _check(scene, result, tree, {"engine_restarts": 1})
    assert result.counts["turns_resubmitted"] > 0


@_in("two of each")
def test_one_of_two_workers_killed(scene):
    controller = scene.controller
    tree = _tree(controller.fleet.workers[1])
    result = _disturbed(scene, tree[0].kill)
    _check(scene, result, tree, {"worker_restarts": 1})
    assert 0 < result.counts["groups_requeued"] < len(scene.prompts)


@_in("two of each")
def test_an_engine_and_a_worker_killed_at_once(scene):
    """The new worker must not sample from the new engine before that has its weights."""
    controller = scene.controller
    tree = [*_tree(controller.fleet.engines[0]), *_tree(controller.fleet.workers[0])]

    def kill():
        for process in tree:
            process.kill()

    result = _disturbed(scene, kill)
    _check(scene, result, tree, {"engine_restarts": 1, "worker_restarts": 1})


@_in("two of each")
@pytest.mark.parametrize("part", ["ray::", "VLLM::EngineCore"], ids=["actor", "core"])
def test_an_engine_that_hangs_is_ended_and_its_turns_are_asked_for_again(scene, part, capfd):
    controller = scene.controller
    tree = _tree(controller.fleet.engines[0])
    result = _disturbed(scene, _named(tree, part).suspend)
    _check(scene, result, tree, {"engine_restarts": 1, "engine_hangs": 1})
    assert result.counts["turns_resubmitted"] > 0
    log = capfd.readouterr().err
    assert "engine 0 hangs: no sign of life for" in log and "engine 0 serves again" in log


@_in("two of each")
def test_a_worker_that_hangs_is_ended_and_its_groups_start_again(scene):
    controller = scene.controller
    tree = _tree(controller.fleet.workers[0])
    result = _disturbed(scene, tree[0].suspend)
    _check(scene, result, tree, {"worker_restarts": 1, "worker_hangs": 1})
    assert 0 < result.counts["groups_requeued"] < len(scene.prompts)


@_in("two of each")
def test_an_engine_that_only_pauses_is_left_alone(scene):
    controller = scene.controller
    core = _named(_tree(controller.fleet.engines[0]), "VLLM::EngineCore")

    def pause():
        core.suspend()
        threading.Timer(0.4 * SILENCE_TIMEOUT_S, core.resume).start()

    result = _disturbed(scene, pause)
    _check(scene, result, [], {})


@_in("local sandbox")
def test_a_sandbox_killed_in_the_middle_costs_retries_and_no_trajectory(scene):
    worker = scene.controller.fleet.workers[0]
    tree, is_over = _tree(worker), threading.Event()

    def num_retries(self):
        return self._incidents._counts["sandbox_retries"]

    def kill_guests():
        while not is_over.is_set() and not ray.get(worker.__ray_call__.remote(num_retries)):
            for process in tree[0].children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.5)

    thread = threading.Thread(target=kill_guests)
    thread.start()
    result = roll_out(scene.controller, scene.prompts)
    is_over.set()
    thread.join()
    _check(scene, result, [], {})
    assert result.counts["sandbox_retries"] > 0, "no call was running: the test shows nothing"


@_in("tensor parallel")
@pytest.mark.parametrize(
    ("number", "counts"),
    [
        (signal.SIGKILL, {"engine_restarts": 1}),
        (signal.SIGSTOP, {"engine_restarts": 1, "engine_hangs": 1}),
    ],
    ids=["killed", "stopped"],
)
def test_an_engine_that_loses_one_tensor_parallel_process_is_replaced_whole(scene, number, counts):
    controller = scene.controller
    tree = _tree(controller.fleet.engines[0])
    worker = _named(tree, "VLLM::Worker_TP1")
    assert _named(tree, "VLLM::Worker_TP0") != worker
    result = _disturbed(scene, lambda: worker.send_signal(number))
    _check(scene, result, tree, counts)
    assert result.counts["turns_resubmitted"] > 0
