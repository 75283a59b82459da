"""Rows of the files a user brings: JSONL, Parquet, CSV. Each with the place it stands at."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from megatron_sod.errors import DataError

Row = tuple[dict, str]  # columns, and "FILE row NUMBER"


def file_rows(source: str) -> Iterator[Row]:
    """Every row of a file; the ending of its name chooses the format, JSONL being the default.

    Raises:
        DataError: the file is missing, or a row cannot be read; names file and row.
    """
    path = Path(source)
    if not path.is_file():
        raise DataError(
            f"data file {source}: no such file; give a .jsonl, .parquet or .csv path, or "
            "tiny_world:SPLIT:COUNT"
        )
    readers = {".parquet": _parquet_rows, ".csv": _csv_rows}
    yield from readers.get(path.suffix, _jsonl_rows)(path)


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    for number, row in enumerate(table.to_pylist(), 1):
        yield row, f"{path} row {number}"


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 24)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        try:
            for number, row in enumerate(csv.DictReader(lines, strict=True), 1):
                if None in row or None in row.values():
                    raise DataError(f"{path} row {number}: not as many cells as the header names")
                yield dict(row), f"{path} row {number}"
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not a readable CSV file in UTF-8 ({error})") from error


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if not line.isascii() and any("\udc80" <= c <= "\udcff" for c in line):
                raise DataError(f"{path} row {number}: not UTF-8 text; convert the file")
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path} row {number}: not valid JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{path} row {number}: expected an object, found {row!r:.80}")
            yield row, f"{path} row {number}"
