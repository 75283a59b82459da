"""Scalars reach TensorBoard and wandb, step by step.

Layers: pure; TensorBoard's event files read back; wandb offline. The names: test_reference_names.
"""

import builtins
import math

import pytest

from megatron_sod.errors import ConfigError
from megatron_sod.observe.loggers import open_loggers
from tests.helpers.tiny import sod_config

SCALARS = {
    "iteration": 3,
    "actor/student_entropy": 0.5,
    "actor/kl_k1": 0.25,
    "rollout/num_turns": 3.0,
    "sod/w_mean": 0.9,
}


def _config(*loggers):
    return sod_config("s", "t", observe={"loggers": list(loggers)}, name="run-1")


def test_console_and_jsonl_need_no_logger(tmp_path):
    assert open_loggers(_config("console", "jsonl"), tmp_path) == []


def test_tensorboard_files_hold_every_scalar(tmp_path):
    pytest.importorskip("tensorboard", reason="an optional logger")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (logger,) = open_loggers(_config("tensorboard"), tmp_path)
    logger.log(3, SCALARS)
    logger.log(4, {**SCALARS, "sod/w_mean": math.nan})
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(SCALARS)
    assert [(e.step, e.value) for e in events.Scalars("actor/student_entropy")] == [
        (3, 0.5),
        (4, 0.5),
    ]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_named_with_the_remedy(tmp_path, monkeypatch, name):
    real = builtins.__import__

    def blocked(module, *args, **kwargs):
        if module.split(".")[0] == name:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    monkeypatch.setattr("importlib.import_module", lambda module: blocked(module))
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        open_loggers(_config(name), tmp_path)


def test_wandb_runs_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="an optional logger")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (logger,) = open_loggers(_config("wandb"), tmp_path)
    logger.log(1, SCALARS)
    logger.log(2, SCALARS)
    logger.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
