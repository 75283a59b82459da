"""Writes docs/api.md: the functions and classes other programs may import, with their docstrings.

python docs/make_api.py > docs/api.md
"""

from __future__ import annotations

import importlib
import inspect

MODULES = {
    "megatron_sod.algorithm": "Step divergences, step weights, advantages: pure torch.",
    "megatron_sod.ops": "The vocabulary-parallel op. CPU and CUDA where built, PyTorch elsewhere.",
    "megatron_sod.types": "What flows through one iteration.",
    "megatron_sod.errors": "Everything this package raises on purpose.",
    "megatron_sod.sandbox": "Isolated Python.",
}
HEAD = """# API

What other programs may import; everything else may change. Written by `python docs/make_api.py`
from the docstrings. Command lines are in the [README](../README.md#commands), keys in
[configuration](configuration.md).
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, about in MODULES.items():
        parts.append(f"## {name}\n\n{about}\n")
        parts += [_entry(member, found) for member, found in _members(name)]
    return "\n".join(parts)


def _members(name: str) -> list[tuple[str, object]]:
    module = importlib.import_module(name)
    names = getattr(module, "__all__", None) or [
        member
        for member, found in vars(module).items()
        if inspect.isclass(found) and found.__module__ == name
    ]
    found = [(member, getattr(module, member)) for member in names]
    return [(m, f) for m, f in found if inspect.isclass(f) or inspect.isfunction(f)]


def _entry(name: str, found: object) -> str:
    text = inspect.getdoc(found) or ""
    if inspect.isclass(found) and (issubclass(found, Exception) or not text):
        return f"### {name}\n\n{text}\n"
    try:
        signature = str(inspect.signature(found))  # type: ignore[arg-type]
    except ValueError:
        signature = "(...)"
    return f"### {name}\n\n```text\n{name}{signature}\n\n{text}\n```\n"


if __name__ == "__main__":
    print(page(), end="")
