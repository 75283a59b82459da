"""What a person sees of an import: where each key went, and what is still to be set."""

from __future__ import annotations

import tempfile
from pathlib import Path

from megatron_sod.config.import_verl import Imported
from megatron_sod.config.load import load_config
from megatron_sod.errors import ConfigError


def source_text(source: list[str]) -> str:
    """The text of one script file, or overrides one per line.

    Raises:
        ConfigError: there is no such file.
    """
    if len(source) == 1 and "=" not in source[0]:
        path = Path(source[0])
        if not path.is_file():
            raise ConfigError(f"{path}: no such script; give a file, or overrides as key=value")
        return path.read_text()
    return "\n".join(source)


def account(imported: Imported) -> str:
    """Where each key went."""
    lines = [f"{len(imported.carried)} keys carried over"]
    lines += [f"  {theirs} -> {ours}" for theirs, ours in imported.carried.items()]
    lines += [f"{len(imported.left)} keys not carried over"]
    lines += [f"  {key}: {why}" for key, why in imported.left.items()]
    lines += ["assumed", *(f"  {note}" for note in imported.assumed)]
    return "\n".join(lines)


def check_loads(text: str) -> None:
    """Load the result as the trainer would.

    Raises:
        ConfigError: what is still to be set, all of it at once.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        try:
            load_config(file.name)
        except ConfigError as error:
            problems = str(error).replace(file.name, "the result")
            raise ConfigError(f"{problems}\nset the missing keys with --set KEY=VALUE") from error
