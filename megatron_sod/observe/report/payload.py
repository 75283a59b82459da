"""Typed columns and JSON in one compressed text that a page unpacks without a library.

    base64( gzip( uint32 header length | JSON header | padding | column | column | ... ) )

The header names each column's type, offset and length; columns start at multiples of 8 bytes, so
that the page looks into the buffer instead of copying it.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

_ALIGN = 8


def pack(meta: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> str:
    """The text to place in a page; `meta` must be JSON without NaN.

    Raises:
        ValueError: a column is not one of the types a page can look into.
    """
    layout, parts, at = {}, [], 0
    for name, column in columns.items():
        if column.dtype.str not in _JS_ARRAYS:
            raise ValueError(f"column {name!r} has dtype {column.dtype}; use {list(_JS_ARRAYS)}")
        data = np.ascontiguousarray(column).tobytes()
        layout[name] = {"type": _JS_ARRAYS[column.dtype.str], "at": at, "length": column.size}
        data += bytes(-len(data) % _ALIGN)
        parts.append(data)
        at += len(data)
    header = json.dumps({**meta, "columns": layout}, allow_nan=False).encode()
    header += b" " * (-(4 + len(header)) % _ALIGN)
    body = len(header).to_bytes(4, "little") + header + b"".join(parts)
    return base64.b64encode(gzip.compress(body, 6, mtime=0)).decode()


def unpack(text: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `pack` was given; for tests and scripts that read a report back."""
    body = gzip.decompress(base64.b64decode(text))
    end = 4 + int.from_bytes(body[:4], "little")
    meta = json.loads(body[4:end])
    kinds = {js: np.dtype(kind) for kind, js in _JS_ARRAYS.items()}
    columns = {
        name: np.frombuffer(body, kinds[c["type"]], c["length"], end + c["at"])
        for name, c in meta.pop("columns").items()
    }
    return meta, columns


_JS_ARRAYS = {
    "|u1": "Uint8Array",
    "<u2": "Uint16Array",
    "<i2": "Int16Array",
    "<i4": "Int32Array",
    "<u4": "Uint32Array",
    "<f4": "Float32Array",
    "<f8": "Float64Array",
}
