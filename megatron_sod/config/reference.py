"""The configuration reference, written from the schema: docs/configuration.md.

python -m megatron_sod.config.reference > docs/configuration.md
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_sod.config.methods import PRESETS
from megatron_sod.config.schema import SftConfig, SodConfig

_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "min_length": "at least"}
_HEAD = """# Configuration

Every key with its meaning, default and range; written from `megatron_sod/config/schema.py` by
`python -m megatron_sod.config.reference > docs/configuration.md`. A file may start from others with
`defaults: [other.yaml]`, and every key can be given on the command line as `section.key=value`.
Unknown keys are refused with the nearest valid name; every problem is listed at once.
"""


@dataclass(frozen=True)
class Key:
    """One leaf of a configuration."""

    path: str  # "distill.step_weight.delta"
    kind: str  # "float"
    default: str  # "0.2", or "required"
    bounds: str  # ">= 0"
    meaning: str


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Every leaf key of a schema, in its order."""
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            yield from keys(section, f"{prefix}{name}.")
        else:
            yield Key(
                prefix + name,
                _kind(field.annotation),
                _default(field),
                _bounds(field),
                field.description or "",
            )


def reference() -> str:
    """The whole page."""
    parts = [_HEAD, "## Methods", _methods()]
    for title, schema in (
        ("Training: `tools/train_sod.py`", SodConfig),
        ("Cold start: `tools/train_sft.py`", SftConfig),
    ):
        parts += [f"## {title}", _tables(schema)]
    return "\n".join(parts)


def _methods() -> str:
    rows = [
        "`method` presets these keys; a key that is given wins.\n",
        "| method | presets |",
        "|---|---|",
    ]
    for name, preset in PRESETS.items():
        rows.append(f"| `{name}` | {', '.join(f'`{k}={v}`' for k, v in _flat(preset)) or '-'} |")
    return "\n".join(rows) + "\n"


def _flat(preset: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in preset.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _tables(schema: type[BaseModel]) -> str:
    lines, section = [], None
    for key in keys(schema):
        found = key.path.rpartition(".")[0]
        if found != section:
            section = found
            lines += ["", f"### {'`' + section + '`' if section else 'Top level'}", ""]
            lines += ["| key | type | default | range | meaning |", "|---|---|---|---|---|"]
        cells = [f"`{key.path}`", key.kind, f"`{key.default}`", key.bounds, key.meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _section(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _kind(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return " / ".join(str(value) for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        named = [_kind(a) for a in get_args(annotation) if a is not type(None)]
        return " or ".join([*named, "null"])
    if origin is list:
        return f"list of {_kind(get_args(annotation)[0])}"
    return getattr(annotation, "__name__", str(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _bounds(field: FieldInfo) -> str:
    found = []
    for rule in field.metadata:
        found += [
            f"{sign} {getattr(rule, name)}" for name, sign in _BOUNDS.items() if hasattr(rule, name)
        ]
    return ", ".join(found)


if __name__ == "__main__":
    print(reference(), end="")
