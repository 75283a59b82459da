"""The files around a checkpoint's tensors: what is in it, whether all of it is still there.

Pure: no process group. A checkpoint folder holds, beside what dist_checkpointing writes,

    config.yaml     the resolved configuration
    about.json      format, progress, layout, model, versions
    checksums.json  size and SHA-256 of every other file; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from megatron_sod.errors import CheckpointError

FORMAT = "megatron_sod"
FORMAT_VERSION = 1
ABOUT, CONFIG, CHECKSUMS, LATEST, BEST = (
    "about.json",
    "config.yaml",
    "checksums.json",
    "latest",
    "best",
)
FileSums = dict[str, dict[str, Any]]


def folder_name(iteration: int) -> str:
    return f"iter_{iteration:06d}"


def iteration_of(folder: Path) -> int:
    return int(folder.name.removeprefix("iter_"))


def complete_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoint folders, oldest first."""
    return sorted(p for p in root.glob("iter_*") if p.is_dir() and p.name[5:].isdigit())


def marked(root: Path, marker: str) -> Path | None:
    """The folder a marker file names; None without the marker.

    Raises:
        CheckpointError: the marker names a folder that is not there.
    """
    file = root / marker
    if not file.is_file():
        return None
    path = root / file.read_text().strip()
    if not path.is_dir():
        names = ", ".join(p.name for p in complete_checkpoints(root)) or "none"
        raise CheckpointError(
            f"{file} names {path.name}, which is not there (complete checkpoints: {names}); write "
            "the name of an existing iter_* folder into it, or delete it to start over"
        )
    return path


def mark(root: Path, marker: str, folder: Path) -> None:
    """Let a marker name `folder`; a crash leaves the old or the new name, never half of one."""
    partial = root / f"{marker}.partial"
    with partial.open("w") as file:
        file.write(folder.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(root / marker)
    sync_folder(root)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a machine crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def delete_old(root: Path, newest: Path, *, keep_last: int) -> None:
    """Keep `newest`, the `keep_last - 1` before it, the best, and anything newer.

    Newer ones exist when a run was resumed from an older checkpoint on purpose; they are replaced
    as the run reaches them.
    """
    until_now = [p for p in complete_checkpoints(root) if p.name <= newest.name]
    best = marked(root, BEST)
    for path in until_now[:-keep_last]:
        if path != best:
            shutil.rmtree(path)


def take_back(root: Path, good: Path, best_iteration: int | None) -> None:
    """Go on from `good`: what was saved after it, in a branch that is given up, goes.

    Args:
        best_iteration: of the best checkpoint up to `good`; None: there is none.
    """
    mark(root, LATEST, good)
    best = root / folder_name(best_iteration) if best_iteration is not None else None
    if best is not None and best.is_dir():
        mark(root, BEST, best)
    else:
        (root / BEST).unlink(missing_ok=True)
    for path in complete_checkpoints(root):
        if path.name > good.name:
            shutil.rmtree(path)


def checksum(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def write_checksums(folder: Path, known: FileSums) -> None:
    """Store `known` and the sums of every file not in it."""
    sums = dict(known)
    for path in sorted(folder.iterdir()):
        if path.name not in sums and path.name != CHECKSUMS:
            sums[path.name] = checksum(path)
    write_json(folder / CHECKSUMS, sums)


def write_json(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_about(folder: Path) -> dict[str, Any]:
    """What the checkpoint says about itself.

    Raises:
        CheckpointError: not a complete checkpoint, not of this package, or of a newer one.
    """
    if not (folder / "metadata.json").is_file():
        raise CheckpointError(
            f"{folder} is not a complete checkpoint (no metadata.json); give an iter_* folder of a "
            "run's checkpoints/"
        )
    try:
        about = json.loads((folder / ABOUT).read_text())
        stored = about["format"], about["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: written by another program, or damaged ({ABOUT}: {error!r}); give an "
            f"iter_* folder of a run's checkpoints/{_others(folder)}"
        ) from error
    if stored[0] != FORMAT or stored[1] > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: format {stored[0]} {stored[1]}, this program reads {FORMAT} up to "
            f"{FORMAT_VERSION}; use the release that wrote it"
        )
    return about


def verify_files(folder: Path, *, part: int = 0, num_parts: int = 1) -> None:
    """Check every `num_parts`-th file against the stored sums, starting with file `part`.

    Raises:
        CheckpointError: names the file, what was expected and found, and the other checkpoints.
    """
    try:
        sums: FileSums = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/{CHECKSUMS}: {error}{_others(folder)}") from error
    for name in sorted(sums)[part::num_parts]:
        path, expected = folder / name, sums[name]
        if not path.is_file():
            raise CheckpointError(f"{path}: missing from the checkpoint{_others(folder)}")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{path}: {size} bytes, {expected['bytes']} were written: the file was cut short "
                f"or replaced{_others(folder)}"
            )
        if checksum(path)["sha256"] != expected["sha256"]:
            raise CheckpointError(
                f"{path}: its content is not what was written (SHA-256 differs){_others(folder)}"
            )


def _others(folder: Path) -> str:
    """The remedy: the checkpoints beside this one, newest first. Nothing has been changed."""
    others = [p for p in complete_checkpoints(folder.parent) if p.name != folder.name]
    others = [p for p in others if (p / CHECKSUMS).is_file()]
    if not others:
        return "; no other checkpoint is beside it: restore the folder, or train.resume=never"
    return f"; nothing was changed: resume from an earlier one with train.resume={others[-1]}"
