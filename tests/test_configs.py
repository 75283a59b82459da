"""Every YAML in configs/ loads and validates with the schema its name implies.

Layer: pure. Whether the models a file names exist is checked when a run starts, not here.
"""

from pathlib import Path

import pytest

from megatron_sod.config.load import (
    config_hash,
    load_config,
    load_eval_config,
    load_sft_config,
    to_yaml,
)
from megatron_sod.config.schema import SftConfig, SodConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "models")


def _load(path: Path) -> SftConfig | SodConfig:
    load = {"sft": load_sft_config, "eval": load_eval_config}
    return load.get(path.name.partition("_")[0], load_config)(path)


def test_both_kinds_of_configuration_are_present():
    kinds = {path.name.startswith("sft_") for path in FILES}
    assert kinds == {True, False}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_file_loads_and_validates(path):
    config = _load(path)
    assert isinstance(config, SftConfig if path.name.startswith("sft_") else SodConfig)
    assert config.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_resolved_file_loads_to_the_same_values(path, tmp_path):
    config = _load(path)
    copy = tmp_path / path.name
    copy.write_text(to_yaml(config))
    assert config_hash(_load(copy)) == config_hash(config)
