"""A result directory that appears complete or not at all."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_sod.errors import CheckpointError, ConfigError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_RESERVE_BYTES = 64 * 1024**2  # file headers, tokenizer and reports


@contextlib.contextmanager
def new_directory(out: str | Path, num_bytes: int) -> Iterator[Path]:
    """Yields a folder beside `out` to write `num_bytes` into; renamed to `out` at the end.

    Raises:
        CheckpointError: `out` holds something already, or the disk has too little space.
    """
    out = Path(out)
    check_is_free(out)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    needed, free = num_bytes + _RESERVE_BYTES, shutil.disk_usage(partial).free
    try:
        if needed > free:
            raise CheckpointError(
                f"{out}: the result needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} "
                "GB free; make room or choose another --out"
            )
        yield partial
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_is_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(
            f"{out} exists and is not an empty directory; choose another --out or delete it"
        )


def num_bytes(text: str) -> int:
    """Bytes of a written size: "5GB" is 5e9; KB, MB, GB are powers of ten, KiB, MiB, GiB of two.

    Raises:
        ConfigError: not a positive size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?b)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise ConfigError(f"size {text!r}: expected a number and a unit, as 5GB or 200MB")
    return size
