"""Turns validation errors into one readable line per problem."""

from __future__ import annotations

import difflib
from typing import get_args

from pydantic import BaseModel, ValidationError


def problems_of(error: ValidationError, schema: type[BaseModel]) -> list[str]:
    """One line per problem: the key, what is wrong, the nearest valid name."""
    return [_describe(item, schema) for item in error.errors()]


def _describe(item, schema: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        siblings = _keys_at(schema, item["loc"][:-1])
        return f"unknown key {key!r}; {_nearest(str(item['loc'][-1]), siblings)}"
    if item["type"] == "missing":
        return f"missing key {key!r}: {_meaning(schema, item['loc'])}"
    return f"{key}: {item['msg'].lower()}, found {item.get('input')!r}"


def _nearest(name: str, siblings: list[str]) -> str:
    matches = difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)
    if matches:
        return f"did you mean {matches[0]!r}?"
    return f"valid here: {', '.join(siblings)}"


def _section(annotation) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _walk(schema: type[BaseModel], location: tuple) -> type[BaseModel] | None:
    current: type[BaseModel] | None = schema
    for part in location:
        field = current.model_fields.get(str(part)) if current else None
        current = _section(field.annotation) if field else None
    return current


def _keys_at(schema: type[BaseModel], location: tuple) -> list[str]:
    section = _walk(schema, location)
    return list(section.model_fields) if section else []


def _meaning(schema: type[BaseModel], location: tuple) -> str:
    section = _walk(schema, location[:-1])
    field = section.model_fields.get(str(location[-1])) if section else None
    return (field.description if field else None) or "it has no default and must be given"
