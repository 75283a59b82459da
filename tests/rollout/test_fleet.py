"""Dead and silent actors are replaced, within a budget, and nobody samples from a half-made engine.

Layer: the fleet over actors without processes (tests/helpers/fake_ray.py). Real ones:
test_controller.py, test_lost_actors.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("ray", reason="actors are ray's")

from megatron_sod.errors import RolloutError  # noqa: E402
from megatron_sod.rollout import controller as controller_module  # noqa: E402
from megatron_sod.rollout import engine_actor  # noqa: E402
from megatron_sod.rollout import fleet as fleet_module  # noqa: E402
from megatron_sod.rollout.controller import RolloutController  # noqa: E402
from megatron_sod.rollout.engine import EngineWeights  # noqa: E402
from megatron_sod.rollout.fleet import Fleet  # noqa: E402
from megatron_sod.rollout.groups import GroupRequest, GroupResult  # noqa: E402
from megatron_sod.rollout.pulse import Pulse  # noqa: E402
from megatron_sod.rollout.worker import GroupSampling  # noqa: E402
from megatron_sod.types import Prompt  # noqa: E402
from tests.helpers.fake_ray import FakeRay  # noqa: E402
from tests.helpers.tiny import sod_config  # noqa: E402

LIMIT_S, START_S = 20.0, 90.0
KEPT = EngineWeights({"setup": {"is_kept": True}}, {"policy_version": 3}, 3)


@pytest.fixture
def fake_ray(monkeypatch):
    fake = FakeRay()
    monkeypatch.setattr(fleet_module, "ray", fake)
    monkeypatch.setattr(engine_actor, "ray", fake)
    monkeypatch.setattr(fleet_module, "time", SimpleNamespace(monotonic=lambda: fake.now))
    monkeypatch.setattr(fleet_module, "get", fake.answers)
    monkeypatch.setattr(
        fleet_module, "Pulse", lambda *args, **more: Pulse(*args, **more, clock=lambda: fake.now)
    )
    monkeypatch.setattr(fleet_module, "log_folder", lambda: "LOGS")
    return fake


def _config():
    rollout = {
        "num_workers": 2,
        "max_restarts": 2,
        "silence_timeout_s": LIMIT_S,
        "engine": {"num_engines": 2, "start_timeout_s": START_S},
    }
    return sod_config("student", "teacher", rollout=rollout)


@pytest.fixture
def fleet(fake_ray):
    config = _config()
    fleet = Fleet(config, config.student, load_weights=False)
    fleet.weights = KEPT
    return fleet


def _watch(fleet, fake_ray, seconds):
    """As the controller's loop does while groups run."""
    end = fake_ray.now + seconds
    while fake_ray.now < end:
        event = fleet.wait([], end - fake_ray.now)
        if event is not None:
            fleet.handle(event)


def _known_engines(worker):
    """Which engines a worker may ask: those it was made with, and those it heard of."""
    engines = [None if e is None else e._actor for e in worker.arguments[1]]
    for name, arguments in worker.calls:
        if name == "replace_engine":
            engines[arguments[0]] = arguments[1]._actor
    return engines


def test_healthy_actors_are_left_alone(fleet, fake_ray):
    _watch(fleet, fake_ray, 10 * LIMIT_S)
    assert len(fake_ray.actors) == 4 and not fleet.counts


def test_a_silent_engine_is_ended_and_replaced_with_the_weights_the_others_hold(
    fleet, fake_ray, capfd
):
    _watch(fleet, fake_ray, 5)
    old = fleet.engines[1]
    old.state = "silent"
    _watch(fleet, fake_ray, LIMIT_S - 5)
    assert fleet.engines[1] is old, "it has its time"
    _watch(fleet, fake_ray, 15)
    new = fleet.engines[1]
    assert new is not old and old.state == "dead", "its calls fail, so they are made again"
    assert ("join", (KEPT, 1)) in new.calls
    assert fleet.counts == {"engine_hangs": 1, "engine_restarts": 1}
    assert all(_known_engines(worker)[1] is new for worker in fleet.workers)
    log = capfd.readouterr().err
    assert "engine 1 hangs: no sign of life for" in log and "engine 1 serves again" in log


def test_a_silent_worker_is_replaced(fleet, fake_ray):
    _watch(fleet, fake_ray, 5)
    old = fleet.workers[0]
    old.state = "silent"
    _watch(fleet, fake_ray, LIMIT_S + 10)
    assert fleet.workers[0] is not old and old.state == "dead"
    assert fleet.counts == {"worker_hangs": 1, "worker_restarts": 1}


def test_the_weakest_sandbox_of_all_workers_is_reported(fleet, fake_ray, capfd):
    fleet.workers[1].level = "L1"
    fleet.wait_until_ready("student engines")
    assert fleet.sandbox_level == "L1"
    assert "sandbox level L1 (worker 1), L3 (worker 0)" in capfd.readouterr().err


def test_one_level_is_reported_once(fleet, fake_ray, capfd):
    fleet.wait_until_ready("student engines")
    assert fleet.sandbox_level == "L3"
    assert capfd.readouterr().err.strip().endswith("sandbox level L3")


@pytest.mark.parametrize(("before", "after"), [("L3", "L2"), ("L2", "L1")])
def test_a_replacement_with_a_weaker_sandbox_ends_the_run(fleet, fake_ray, before, after):
    for worker in fleet.workers:
        worker.level = before
    fleet.wait_until_ready("student engines")
    fake_ray.on_start = lambda actor: setattr(actor, "level", after)
    fleet.workers[1].state = "dead"
    with pytest.raises(RolloutError, match=f"worker 1, .* level {after}, .* {before}"):
        _watch(fleet, fake_ray, 5)


def test_the_level_of_a_replacement_is_known_before_what_it_made_is_taken(fleet, fake_ray):
    fleet.wait_until_ready("student engines")
    fake_ray.on_start = lambda actor: setattr(actor, "level", "L1")
    fleet.workers[1].state = "dead"
    fleet.handle(fleet.wait([], 1.0))
    made = fleet.workers[1].run_group.remote()
    assert made.is_ready
    with pytest.raises(RolloutError, match="level L1"):
        fleet.handle(fleet.wait([made], 1.0))


def test_a_replacement_as_isolated_as_before_works_on(fleet, fake_ray):
    fleet.wait_until_ready("student engines")
    fleet.workers[1].state = "dead"
    _watch(fleet, fake_ray, 5)
    assert fleet.counts == {"worker_restarts": 1}


def test_a_replacement_that_dies_before_its_level_is_known_is_replaced(fleet, fake_ray):
    fleet.wait_until_ready("student engines")
    ill = ["dead"]
    fake_ray.on_start = lambda actor: setattr(actor, "state", ill.pop() if ill else "serving")
    fleet.workers[1].state = "dead"
    _watch(fleet, fake_ray, 5)
    assert fleet.counts == {"worker_restarts": 2} and fleet.workers[1].state == "serving"


def test_a_worker_that_starts_while_an_engine_joins_does_not_sample_from_it(fleet, fake_ray):
    """The joining engine holds random weights until the transfer: what it says is not the
    student's."""
    fake_ray.on_start = lambda actor: setattr(
        actor, "state", "starting" if actor.kind == "Engine" else "serving"
    )
    fleet.engines[0].state = fleet.workers[0].state = "dead"
    _watch(fleet, fake_ray, 5)
    joining, worker = fleet.engines[0], fleet.workers[0]
    assert _known_engines(worker) == [None, fleet.engines[1]]
    joining.state = "serving"
    _watch(fleet, fake_ray, 5)
    assert _known_engines(worker) == [joining, fleet.engines[1]]


def test_an_engine_that_never_gets_ready_is_replaced_after_the_time_to_start(fleet, fake_ray):
    ill = ["starting"]
    fake_ray.on_start = lambda actor: setattr(actor, "state", ill.pop() if ill else "serving")
    fleet.engines[0].state = "dead"
    _watch(fleet, fake_ray, START_S - 5)
    assert fleet.counts == {"engine_restarts": 1}
    assert fleet.heal() and fleet.counts == {"engine_restarts": 2, "engine_hangs": 1}
    assert fleet.engines[0].state == "serving"


def test_an_engine_that_cannot_take_the_weights_is_replaced_until_the_budget_is_spent(
    fleet, fake_ray
):
    error = RolloutError("checksum differs")
    fake_ray.on_start = lambda actor: setattr(actor, "join_error", error)
    fleet.engines[0].state = "dead"
    with pytest.raises(RolloutError, match="max_restarts allows 2") as raised:
        fleet.heal(5.0)
    assert "checksum differs" in str(raised.value)


def test_weights_that_are_not_kept_end_the_run_at_once_with_what_to_do(fleet, fake_ray):
    fleet.weights = EngineWeights({"rank_offset": 1})
    fleet.engines[0].state = "dead"
    with pytest.raises(RolloutError, match="transfer.keep_sent true"):
        fleet.heal(5.0)
    assert len(fake_ray.actors) == 4, "no engine was started in vain"


def test_healing_finds_an_engine_that_hangs_and_waits_for_its_successor(fleet, fake_ray):
    _watch(fleet, fake_ray, 5)
    fleet.engines[0].state = "silent"
    assert fleet.heal(5.0)
    assert fleet.counts["engine_hangs"] == 1 and fleet.engines[0].state == "serving"
    assert not fleet.heal(5.0), "now there is nothing to do"


def test_a_new_rollout_has_a_new_budget_of_restarts(fleet, fake_ray):
    for _ in range(3):
        fleet.begin_rollout()
        fleet.engines[0].state = fleet.workers[1].state = "dead"
        _watch(fleet, fake_ray, 5)
        assert fleet.take_counts() == {"engine_restarts": 1, "worker_restarts": 1}
        assert not fleet.take_counts(), "counted once"


@pytest.fixture
def controller(fake_ray, monkeypatch):
    monkeypatch.setattr(controller_module, "start_ray", lambda: None)
    monkeypatch.setattr(controller_module, "get", fake_ray.answers)
    config = _config()
    return RolloutController(config, config.student, load_weights=False)


def test_a_transfer_waits_for_an_engine_that_still_joins(controller, fake_ray):
    """It died in a rollout that the other engine finished alone; two transfers at a time would
    leave it with either's weights."""
    fleet, control = controller.fleet, controller.engine_control()
    fleet.weights = replace(KEPT, canaries=[[1, 2]], canary_logprobs=[[-0.5]])
    fake_ray.on_start = lambda actor: setattr(actor, "join_result", [[-0.5]])
    fleet.engines[0].state = "dead"
    fleet.handle(fleet.wait([], 1.0))
    assert fleet.engines[0].calls[-1][0] == "join"
    control.update({"policy_version": 4}, 4)
    assert [name for name, _ in fleet.engines[0].calls][-1] == "update_weights"
    assert all(_known_engines(worker)[0] is fleet.engines[0] for worker in fleet.workers)
    assert fleet.weights.policy_version == 4


def test_every_incident_is_counted_once_whatever_was_going_on(controller, fake_ray):
    """A transfer that precedes an evaluation, the evaluation, and a rollout that is discarded."""
    fleet, control = controller.fleet, controller.engine_control()
    fleet.weights = KEPT
    fleet.engines[0].state = "dead"
    control.update({"policy_version": 4}, 4)
    for worker in fleet.workers:
        worker.group_result = GroupResult([], Counter(sandbox_retries=2))
    sampling = {"temperature": 1.0, "top_p": 1.0}
    prompts = [Prompt(f"p{i}", [1], "4", "gsm8k") for i in range(3)]
    controller.rollout(prompts, tag="eval", num_generations=0, **sampling)
    groups = [GroupRequest(prompt, "1", 0) for prompt in prompts]
    controller.run(groups, GroupSampling(**sampling, seed=1), what="rollout 1")
    fleet.engines[1].state = "dead"
    control.update({"policy_version": 5}, 5)
    config = _config()
    teacher = RolloutController(config, config.student, load_weights=True, counts=controller.counts)
    for worker in teacher.fleet.workers:
        worker.group_result = GroupResult([], Counter(turns_resubmitted=1))
    teacher.rollout(prompts[:1], tag="eval", num_generations=0, **sampling)
    expected = {"engine_restarts": 2, "sandbox_retries": 12, "turns_resubmitted": 1}
    assert controller.take_counts() == expected
    assert not controller.take_counts() and not teacher.take_counts()
