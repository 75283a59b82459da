"""The smallest configuration that loads, and everything that is wrong with another."""

import pytest

from megatron_sod.config.load import load_config
from megatron_sod.errors import ConfigError

BASE = """
student: {path: models/s}
teacher: {path: models/t}
data: {train: ["tiny_world:train:10"]}
train: {num_iterations: 3}
"""


def problems(path, overrides=None, load=load_config) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)
