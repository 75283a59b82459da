"""Every program of the table at each level this machine reaches, as root and as another user.

One process per (level, user) runs the whole table (harness.py); each program is then one test.
The cold runs, in which every program gets a fresh interpreter, are marked slow.
"""

import functools
import json
import os
import subprocess
import sys

import pytest

from tests.sandbox import harness

IS_ROOT = os.getuid() == 0
NOBODY = ("--uid", "65534")
DOCKER = ("-m", "tests.sandbox.container", sys.executable)
# name -> (interpreter's options in front, level, options behind); the last two only root can try.
PLACES = {
    "L3": ((), "L3", ()),
    "L2": ((), "L2", ()),
    "L1": ((), "L1", ()),
    "L3-nobody": ((), "L3", NOBODY),
    "L2-nobody": ((), "L2", NOBODY),
    "L2-docker": (DOCKER, "L2", ("--closed",)),
}
COLD = {f"{name}-cold": (*PLACES[name][:2], (*PLACES[name][2], "--warm", "0")) for name in PLACES}
ONLY_ROOT = ("nobody", "docker")


@functools.cache
def run_place(name):
    """The harness's answer, or the reason why this place cannot be had here."""
    front, level, options = (PLACES | COLD)[name]
    if not IS_ROOT and any(word in name for word in ONLY_ROOT):
        return "only root can become another user or give up capabilities"
    command = [sys.executable, *front, "-m", "tests.sandbox.harness", "--level", level, *options]
    environment = {**os.environ, "SECRET_TOKEN": harness.MARK}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    if run.returncode == 0:
        return json.loads(run.stdout)
    reason = run.stderr.strip().split("\n")[-1]
    # A level that is missing is a fact about the machine; anything else is a failure of ours.
    is_missing = "no permitted isolation level" in reason or "PermissionError" in reason
    return reason if is_missing else run.stderr[-3000:]


def _answer(place):
    answer = run_place(place)
    if isinstance(answer, str):
        if "Traceback" in answer:
            pytest.fail(answer)
        pytest.skip(answer)
    return answer


def _check(place, name):
    answer = _answer(place)
    case = harness.ALL[name]
    level = (PLACES | COLD)[place][1]
    if level not in case.levels:
        pytest.skip(f"{level} does not promise this")
    result = answer["results"][name]
    assert case.holds(result, level, answer["shared"], {}), (case.check, result)


@pytest.mark.parametrize("name", list(harness.ALL))
@pytest.mark.parametrize("place", PLACES)
def test_program_is_contained(place, name):
    _check(place, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(harness.ALL))
@pytest.mark.parametrize("place", COLD)
def test_program_is_contained_in_a_fresh_interpreter(place, name):
    _check(place, name)


@pytest.mark.parametrize("place", PLACES)
def test_host_is_untouched_and_nothing_is_left(place):
    assert _answer(place)["end"] == {"untouched": True, "survivors": [], "still": "served\n"}


@pytest.mark.parametrize("place", PLACES)
def test_no_program_is_blamed_on_the_sandbox(place):
    results = _answer(place)["results"]
    assert [n for n, r in results.items() if r["outcome"] == "infra_error"] == []


def test_some_level_is_reached():
    """Every Linux machine that runs this suite has at least one level; none would skip it all."""
    assert any(isinstance(run_place(place), dict) for place in PLACES)
