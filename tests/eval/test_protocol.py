"""A protocol's hash changes with what can change the numbers, and with nothing else.

Layer: pure; the isolation level is found by opening the real sandbox, once.
"""

import json
from dataclasses import replace

import pytest

from megatron_sod.config.load import load_eval_config
from megatron_sod.data.tiny_models import STUDENT, write_tiny_model
from megatron_sod.errors import ConfigError, DataError
from megatron_sod.eval import protocol as module
from megatron_sod.eval.protocol import protocol, protocol_hash
from megatron_sod.eval.tasks import eval_tasks
from megatron_sod.sandbox import open_sandbox
from tests.helpers.scripted_samples import Sampler, eval_config, evaluate


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, **STUDENT)
    return str(folder)


def _protocol(config) -> dict:
    return protocol(config, eval_tasks(config).prompts)


def _hash(config) -> str:
    return protocol_hash(_protocol(config))


def test_it_does_not_depend_on_the_model_or_on_where_files_lie(model, tmp_path):
    copies = []
    for name in ("a", "b"):
        path = tmp_path / name / "tasks.jsonl"
        path.parent.mkdir()
        path.write_text('{"prompt": "1+1", "answer": "2"}\n')
        copies.append(_hash(load_eval_config(None, [], model=model, data=[str(path)])))
    assert copies[0] == copies[1]
    config = eval_config(model)
    prompts = eval_tasks(config).prompts
    changed = [replace(prompts[0], answer="x"), *prompts[1:]]
    assert protocol_hash(protocol(config, changed)) != protocol_hash(protocol(config, prompts))


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "eval.seeds=[0,1]",
        "eval.top_p=0.5",
        "rollout.trajectory_timeout_s=60",
        "rollout.max_tool_calls_per_turn=2",
        "sandbox.level=L1",
        "sandbox.memory_mb=77",
        "reward.kind=exact",
    ],
)
def test_it_changes_with_each_setting_that_changes_the_numbers(model, override):
    assert _hash(eval_config(model, override)) != _hash(eval_config(model))


@pytest.mark.parametrize(
    "override",
    ["name=other", "eval.prompts_per_round=2", "sandbox.max_concurrency=3", "train.lr=0.5"],
)
def test_it_does_not_change_with_the_others(model, override):
    assert _hash(eval_config(model, override)) == _hash(eval_config(model))


def test_the_level_is_the_one_programs_get(model):
    """auto names another isolation on every machine."""
    with open_sandbox(level="auto") as sandbox:
        level = sandbox.level
    found = _protocol(eval_config(model))
    assert found["sandbox"]["level"] == level != "auto"
    assert found == _protocol(eval_config(model, f"sandbox.level={level}"))


@pytest.mark.parametrize("name", ["metrics.py", "report.py", "samples.py"])
def test_it_changes_with_how_samples_are_counted(model, monkeypatch, name):
    before = _hash(eval_config(model))
    read = module._source_text
    monkeypatch.setattr(
        module, "_source_text", lambda n: [*read(n), "# edited"] if n == f"eval/{name}" else read(n)
    )
    assert _hash(eval_config(model)) != before


def test_it_changes_with_the_code_of_an_imported_reward(model, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    override = ["reward.kind=import", "reward.function=reward_of_mine:grade"]
    with pytest.raises(ConfigError, match="cannot be imported"):
        _hash(eval_config(model, *override))
    source = tmp_path / "reward_of_mine.py"
    source.write_text("def grade(prompt, text):\n    return 1.0\n")
    before = _hash(eval_config(model, *override))
    assert before == _hash(eval_config(model, *override))
    source.write_text("def grade(prompt, text):\n    return 0.0\n")
    assert _hash(eval_config(model, *override)) != before


@pytest.mark.parametrize("function", ["math:fsum", "functools:partial", "statistics:fmean"])
def test_a_reward_that_is_no_file_of_its_own_has_a_protocol_too(model, function):
    _hash(eval_config(model, "reward.kind=import", f"reward.function={function}"))


def test_it_names_python_and_what_programs_can_import(model):
    import platform

    import numpy

    found = _protocol(eval_config(model))
    assert found["packages"]["python"] == platform.python_version()
    assert found["guest"]["numpy"] == numpy.__version__
    service = ["sandbox.kind=sandbox_fusion", "sandbox.url=[http://localhost:1]"]
    remote = _protocol(eval_config(model, *service))
    assert remote["guest"] is None and remote["sandbox"]["level"] == "service"
    json.dumps(found)


def test_a_folder_of_another_protocol_says_what_differs(model, tmp_path):
    evaluate(eval_config(model), tmp_path, Sampler())
    with pytest.raises(DataError, match="undo what differs in protocol.json: seed, limits"):
        evaluate(eval_config(model, "seed=3", "rollout.max_turns=3"), tmp_path, Sampler())
