"""YAML files written on the spot."""

import pytest


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "run.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write
