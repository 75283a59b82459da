"""Shapes of a model whose files are not here: configs/models/*.yaml stand in for config.json."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from megatron_sod.config.schema import ModelConfig
from megatron_sod.errors import ModelError
from megatron_sod.model.geometry import Geometry, geometry_from_hf, load_geometry

MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"


def planned_geometry(model: ModelConfig) -> Geometry:
    """From the directory of `geometry` or `path` where it exists, else from configs/models.

    Raises:
        ModelError: neither is there, or the architecture is not supported.
    """
    place = model.geometry or model.path
    if Path(place).is_dir():
        return load_geometry(place)
    name = model.geometry or Path(model.path).name.lower()
    return shipped_geometry(name, wanted_by=model.path)


def shipped_geometry(name: str, *, wanted_by: str = "") -> Geometry:
    """The geometry in configs/models/NAME.yaml, e.g. "qwen3-1.7b"."""
    file = MODELS / f"{name}.yaml"
    if not file.is_file():
        raise ModelError(
            f"model {wanted_by or name}: no such directory, and no configs/models/{name}.yaml to "
            f"plan with; name one of {', '.join(shipped_names())} in its `geometry` key"
        )
    config = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(config, dict), f"{file} is not a mapping"
    return geometry_from_hf(config, source=str(file.relative_to(MODELS.parents[1])))


def shipped_names() -> list[str]:
    """Names of every geometry in configs/models."""
    return sorted(path.stem for path in MODELS.glob("*.yaml"))
