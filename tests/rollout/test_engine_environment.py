"""Engines may live in an environment of their own.

Layers: pure -> a real engine under another interpreter (slow).
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megatron_sod.config.schema import EngineConfig
from megatron_sod.data.tiny_models import STUDENT, write_tiny_model
from megatron_sod.errors import RolloutError
from megatron_sod.rollout.controller import RolloutController
from megatron_sod.rollout.engine_actor import engine_runtime
from megatron_sod.rollout.ray_instance import stop_ray
from tests.helpers.tiny import sod_config


def test_without_a_setting_engines_share_the_trainers_python(monkeypatch):
    monkeypatch.delenv("SOD_ENGINE_PYTHON", raising=False)
    assert "py_executable" not in engine_runtime(EngineConfig())


def test_the_setting_wins_over_the_variable(monkeypatch):
    monkeypatch.setenv("SOD_ENGINE_PYTHON", "/nowhere/python")
    chosen = engine_runtime(EngineConfig(py_executable=sys.executable))
    assert chosen["py_executable"] == sys.executable


def test_a_python_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("SOD_ENGINE_PYTHON", "/nowhere/python")
    with pytest.raises(RolloutError, match="/nowhere/python"):
        engine_runtime(EngineConfig())


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_engine_serves_from_another_environment(tmp_path):
    """A second virtual environment that sees the same packages stands in for /opt/engine."""
    import ray

    other = tmp_path / "engine"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", other], check=True, timeout=60)
    site = next((other / "lib").glob("python3*")) / "site-packages"
    root = Path(__file__).resolve().parents[2]
    site.joinpath("packages.pth").write_text(f"{root}\n{sysconfig.get_path('purelib')}\n")
    write_tiny_model(tmp_path / "student", **STUDENT)
    small = {"max_prompt_length": 256, "max_response_length": 256, "max_observation_length": 64}
    python = str(other / "bin" / "python")
    config = sod_config(
        tmp_path / "student",
        tmp_path / "student",
        rollout={**small, "engine": {"py_executable": python, "kv_cache_gb": 1}},
    )
    controller = RolloutController(config, config.student, load_weights=False)
    try:
        controller.wait_until_ready("engines")
        assert len(ray.get(controller.fleet.engines[0].score.remote([5, 6, 7]))) == 2
        running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        assert python in running
    finally:
        controller.close()
        stop_ray()
