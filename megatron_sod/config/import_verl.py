"""A verl or SOD launch script -> our YAML, with an account of every key.

Nothing is dropped in silence: a key is carried over, or it is listed with the reason.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from omegaconf import OmegaConf

from megatron_sod.config.schema import ObserveConfig
from megatron_sod.config.verl_keys import NOWHERE, ONLY, SAME
from megatron_sod.config.verl_script import Script
from megatron_sod.errors import ConfigError

_TOKEN_KL = "algorithm.token_kl_reg"
_ACTOR = "actor_rollout_ref.actor"
_RESUME = {"auto": "auto", "disable": "never"}
# verl's engines give their memory back while training; ours keep it, so both must fit at once.
_MAX_ENGINE_SHARE = 0.6
_UNKNOWN = "unknown: neither verl's documented keys nor the SOD recipe's that are listed here"


@dataclass
class Imported:
    """The configuration, and where each key of the script went."""

    values: dict[str, Any] = field(default_factory=dict)  # dotted key of ours -> value
    carried: dict[str, str] = field(default_factory=dict)  # theirs -> ours
    left: dict[str, str] = field(default_factory=dict)  # theirs -> why
    assumed: list[str] = field(default_factory=list)  # what the script does not say

    def to_yaml(self) -> str:
        """The file, opened by the account as comments."""
        lines = ["# Made by tools/import_config.py from a verl launch script."]
        lines += [f"# assumed: {note}" for note in self.assumed]
        lines += [f"# not carried over: {key}: {why}" for key, why in self.left.items()]
        config = OmegaConf.create({})
        for key, value in self.values.items():
            OmegaConf.update(config, key, value)
        return "\n".join(lines) + "\n" + OmegaConf.to_yaml(config)


def import_verl(script: Script, *, num_prompts: int | None = None) -> Imported:
    """Translate the overrides of a launch.

    Args:
        num_prompts: rows of the training files; turns trainer.total_epochs into iterations.
    Raises:
        ConfigError: the script passes no override, or its method has no counterpart.
    """
    if not script.overrides:
        raise ConfigError(
            "no key=value found: give a script that calls `python -m ... key=value` or a list of "
            "overrides"
        )
    theirs = {key.lstrip("+~"): value for key, value in map(_split, script.overrides)}
    done = Imported()
    for key, value in theirs.items():
        _place(key, value, done)
    for word in script.unresolved:
        done.assumed.append(f"{word}: holds a variable that the script does not set")
    _method(theirs, done)
    _layout(theirs, done)
    _length_of_training(theirs, num_prompts, done)
    for extra in (_rewards, _logging):
        extra(theirs, done)
    return done


def _split(word: str) -> tuple[str, Any]:
    key, _, text = word.partition("=")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if isinstance(value, str):
        try:  # YAML reads 1e-6 as text
            value = float(value)
        except ValueError:
            pass
    return key, value


def _place(key: str, value: Any, done: Imported) -> None:
    """Carry the key over, or note why not; keys that several rules share come later."""
    if key in SAME:
        done.carried[key] = SAME[key]
        done.values[SAME[key]] = [value] if SAME[key] in _LISTS and _is_one(value) else value
    elif key in ONLY:
        wanted, why, otherwise = ONLY[key]
        done.left[key] = why if value == wanted else f"{otherwise} (the script has {value})"
    else:
        done.left[key] = _reason(key)


_LISTS = ("data.train", "data.eval")


def _is_one(value: Any) -> bool:
    return not isinstance(value, list)


def _reason(key: str) -> str:
    if key in NOWHERE:
        return NOWHERE[key]
    prefixes = [p for p in NOWHERE if p.endswith((".", "_")) and key.startswith(p)]
    return NOWHERE[max(prefixes, key=len)] if prefixes else _UNKNOWN


def _carry(done: Imported, key: str, ours: str, value: Any) -> None:
    done.left.pop(key, None)
    done.carried[key], done.values[ours] = ours, value


def _method(theirs: Mapping[str, Any], done: Imported) -> None:
    """Which of our methods the switches of the recipe amount to."""
    is_on = bool(theirs.get(f"{_TOKEN_KL}.enable", False))
    is_stepwise = bool(theirs.get(f"{_TOKEN_KL}.stepwise_enable", False))
    if is_on and not is_stepwise:
        raise ConfigError(
            f"{_TOKEN_KL}.stepwise_enable is off: the recipe then gates the teacher by the "
            "advantage, which no method here does; set it to True, or use method=opd for plain "
            "on-policy distillation"
        )
    method = "sod" if is_on else "grpo"
    for key in ("enable", "stepwise_enable"):
        if f"{_TOKEN_KL}.{key}" in theirs:
            _carry(done, f"{_TOKEN_KL}.{key}", "method", method)
    done.values["method"] = method
    if method == "grpo":
        for ours in [o for o in done.values if o.startswith(("distill.", "teacher."))]:
            key = next(k for k, target in done.carried.items() if target == ours)
            done.left[key] = "not needed: token_kl_reg is off, so there is no teacher (grpo)"
            del done.carried[key], done.values[ours]


def _layout(theirs: Mapping[str, Any], done: Imported) -> None:
    """Parallel sizes: verl's FSDP has none to carry over, its sequence split comes nearest."""
    values = done.values
    split = theirs.get(f"{_ACTOR}.ulysses_sequence_parallel_size")
    is_megatron = any(ours.startswith("student.parallel.") for ours in values)
    if split is not None and not is_megatron:
        key = f"{_ACTOR}.ulysses_sequence_parallel_size"
        _carry(done, key, "student.parallel.tensor_model_parallel_size", split)
        values["student.parallel.sequence_parallel"] = split > 1
        done.assumed.append(
            f"tensor_model_parallel_size {split} with sequence_parallel, for a Ulysses split of "
            f"{split}: activations are divided by as many GPUs"
        )
    roles = ["student", "teacher"] if "teacher.path" in values else ["student"]
    for role in roles:
        values.setdefault(f"{role}.dtype", "bfloat16")
    if "teacher.path" in values and not any(o.startswith("teacher.parallel.") for o in values):
        for ours in [o for o in values if o.startswith("student.parallel.")]:
            values[ours.replace("student", "teacher", 1)] = values[ours]
    done.assumed.append("dtype bfloat16, what verl computes in; the optimizer keeps float32")
    gpus = values.get("cluster.gpus_per_node", 1) * values.get("cluster.num_nodes", 1)
    width = values.get("rollout.engine.tensor_parallel_size", 1)
    values["rollout.engine.num_engines"] = max(1, gpus // width)
    share = values.get("rollout.engine.gpu_memory_utilization", 0.0)
    if share > _MAX_ENGINE_SHARE:
        values["rollout.engine.gpu_memory_utilization"] = _MAX_ENGINE_SHARE
        done.assumed.append(
            f"gpu_memory_utilization {_MAX_ENGINE_SHARE} instead of {share}: engines keep their "
            "memory while training; --dry-run says what fits"
        )
    done.assumed.append(f"num_engines {max(1, gpus // width)}: {gpus} GPUs, {width} per engine")


def _length_of_training(theirs: Mapping[str, Any], num_prompts: int | None, done: Imported) -> None:
    epochs, batch = theirs.get("trainer.total_epochs"), done.values.get("train.train_batch_size")
    if epochs is None or "train.num_iterations" in done.values:
        if epochs is not None:
            done.left["trainer.total_epochs"] = "not needed: trainer.total_training_steps is given"
    elif num_prompts is None or batch is None:
        done.left["trainer.total_epochs"] = (
            "needs the number of prompts: give --num-prompts, or train.num_iterations=N"
        )
    else:
        iterations = int(epochs * num_prompts // batch)  # verl drops the last, smaller batch
        _carry(done, "trainer.total_epochs", "train.num_iterations", iterations)
        done.assumed.append(
            f"num_iterations {iterations}: {epochs} epoch(s) of {num_prompts} prompts in batches "
            f"of {batch}"
        )


def _rewards(theirs: Mapping[str, Any], done: Imported) -> None:
    buffer = "reward_model.reward_kwargs.overlong_buffer_cfg"
    if f"{buffer}.enable" in theirs:
        if theirs[f"{buffer}.enable"]:
            done.left.pop(f"{buffer}.enable")
            done.carried[f"{buffer}.enable"] = "reward.overlong_buffer"
        else:
            done.left[f"{buffer}.enable"] = "not needed: reward.overlong_buffer is off by default"
            if done.values.pop("reward.overlong_buffer", None) is not None:
                del done.carried[f"{buffer}.len"]
                done.left[f"{buffer}.len"] = f"not needed: {buffer}.enable is off"
    if "actor_rollout_ref.actor.clip_ratio" in theirs:
        key = f"{_ACTOR}.clip_ratio"
        _carry(done, key, "grpo.clip_low", theirs[key])
        for side in ("low", "high"):
            if f"{_ACTOR}.clip_ratio_{side}" not in theirs:
                done.values[f"grpo.clip_{side}"] = theirs[key]


def _logging(theirs: Mapping[str, Any], done: Imported) -> None:
    """Loggers we know; jsonl is always on. How a run is resumed."""
    if "trainer.logger" in theirs:
        asked = theirs["trainer.logger"]
        asked = asked if isinstance(asked, list) else [asked]
        annotation = ObserveConfig.model_fields["loggers"].annotation
        known = typing.get_args(typing.get_args(annotation)[0])
        kept = [name for name in asked if name in known]
        _carry(done, "trainer.logger", "observe.loggers", sorted({*kept, "jsonl"}))
        for name in sorted(set(asked) - set(known)):
            done.left[f"trainer.logger {name}"] = f"no counterpart: loggers are {', '.join(known)}"
    mode = theirs.get("trainer.resume_mode")
    if mode in _RESUME:
        _carry(done, "trainer.resume_mode", "train.resume", _RESUME[mode])
    elif mode == "resume_path" and "trainer.resume_from_path" in theirs:
        path = theirs["trainer.resume_from_path"]
        _carry(done, "trainer.resume_mode", "train.resume", path)
        _carry(done, "trainer.resume_from_path", "train.resume", path)
