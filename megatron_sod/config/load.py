"""YAML files and dotted overrides -> a validated, frozen configuration."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from megatron_sod.config.methods import PRESETS, REF_COMPAT
from megatron_sod.config.report import problems_of
from megatron_sod.config.rules import cross_field_problems
from megatron_sod.config.schema import SftConfig, SodConfig
from megatron_sod.errors import ConfigError

Schema = TypeVar("Schema", bound=BaseModel)


# What OmegaConf raises for text it cannot read; it passes the YAML parser's errors through.
_UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError)


def load_config(path: str | Path, overrides: list[str] | None = None) -> SodConfig:
    """Merge `path` with its `defaults`, the method's preset and `key=value` overrides; validate.

    Raises:
        ConfigError: lists every problem found, not only the first.
    """
    return _load(path, overrides, SodConfig)


def load_sft_config(path: str | Path, overrides: list[str] | None = None) -> SftConfig:
    """The same for tools/train_sft.py."""
    return _load(path, overrides, SftConfig)


def load_eval_config(
    path: str | Path | None,
    overrides: list[str] | None = None,
    *,
    model: str | None = None,
    data: list[str] | None = None,
    num_samples: int | None = None,
) -> SodConfig:
    """The same for tools/evaluate.py; the keys only training needs are filled in.

    `model`, `data` and `num_samples` win over the file.
    """
    given: dict = {}
    if model is not None:
        given["student"] = {"path": model}
    if data:
        given["data"] = {"eval": data}
    if num_samples is not None:
        given["eval"] = {"num_samples": num_samples}
    layers = [
        OmegaConf.create(_NOT_TRAINED),
        _read_with_defaults(Path(path), seen=()) if path else OmegaConf.create({}),
        OmegaConf.create(given),
        _parse_overrides(overrides or []),
    ]
    config = _validated(path or "evaluation", layers, SodConfig)
    if not config.data.eval:
        raise ConfigError(
            "nothing to evaluate on: give --data FILE..., or data.eval in the configuration"
        )
    return config


_NOT_TRAINED = {
    "method": "grpo",
    "data": {"train": ["unused"]},
    "train": {"num_iterations": 1, "tokens_per_micro_batch": 1 << 30},
}


def _load(path: str | Path, overrides: list[str] | None, schema: type[Schema]) -> Schema:
    layers = [_read_with_defaults(Path(path), seen=()), _parse_overrides(overrides or [])]
    return _validated(path, layers, schema)


def _validated(path: str | Path, layers: list[DictConfig], schema: type[Schema]) -> Schema:
    try:
        merged = OmegaConf.merge(*layers)
        assert isinstance(merged, DictConfig)
        if issubclass(schema, SodConfig):
            merged = _with_presets(merged)
        config = schema.model_validate(OmegaConf.to_container(merged, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValidationError as error:
        raise ConfigError(_listing(path, problems_of(error, schema))) from error
    if problems := cross_field_problems(config):
        raise ConfigError(_listing(path, problems))
    return config


def _with_presets(merged: DictConfig) -> DictConfig:
    """Presets of the method beneath what the user gave; a self-teacher's keys from the student."""
    preset = PRESETS.get(str(OmegaConf.select(merged, "method", default="sod")), {})
    layers = [OmegaConf.create(preset), merged]
    if OmegaConf.select(merged, "ref_compat", default=False) is True:
        layers.insert(1, OmegaConf.create(REF_COMPAT))
    complete = OmegaConf.merge(*layers)
    assert isinstance(complete, DictConfig)
    if OmegaConf.select(complete, "teacher.source") == "self" and "student" in complete:
        complete.teacher = OmegaConf.merge(complete.student, complete.teacher)
    return complete


def config_hash(config: BaseModel) -> str:
    """Twelve hex digits that change with any resolved value."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def to_yaml(config: BaseModel) -> str:
    """The resolved configuration as YAML that loads to the same values."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def _read_with_defaults(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    if path.resolve() in seen:
        chain = " -> ".join(str(file) for file in (*seen, path.resolve()))
        raise ConfigError(f"{path}: `defaults` refer to each other in a circle: {chain}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file; configs/ holds working examples")
    try:
        loaded = OmegaConf.load(path)
    except OSError as error:  # what OmegaConf raises for a document that is a number
        raise ConfigError(f"{path}: expected a mapping of keys ({error})") from error
    except _UNREADABLE as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of keys, found a list or a scalar")
    seen = (*seen, path.resolve())
    parents = [_read_with_defaults(path.parent / name, seen) for name in _defaults(loaded)]
    merged = OmegaConf.merge(*parents, loaded)
    assert isinstance(merged, DictConfig)
    return merged


def _defaults(loaded: DictConfig) -> list[str]:
    names = loaded.pop("defaults", None) or []
    return [names] if isinstance(names, str) else [str(name) for name in names]


def _parse_overrides(overrides: list[str]) -> DictConfig:
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"override {item!r}: expected key=value, e.g. train.lr=1e-6")
    try:
        return OmegaConf.from_dotlist([item.lstrip("-") for item in overrides])
    except _UNREADABLE as error:
        raise ConfigError(f"overrides {overrides}: {error}") from error


def _listing(path: str | Path, problems: list[str]) -> str:
    lines = "\n".join(f"  - {problem}" for problem in problems)
    return f"{path}: {len(problems)} problem(s) in the configuration\n{lines}"
