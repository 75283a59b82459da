"""Tests of LiveCodeBench rows. Private tests come as base64 of zlib of pickle of JSON text.

A pickle can run any code when it is loaded, so only one kind is accepted: text, built by no class.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import zlib
from typing import Any

from megatron_sod.errors import DataError

MAX_BYTES = 1 << 30  # of one row's tests, decompressed; a bomb is refused


def private_tests(value: Any, origin: str) -> list[dict]:
    """The tests of a `private_test_cases` cell: JSON, a list, or the packed form.

    Raises:
        DataError: none of these, a pickle of anything but text, or more than MAX_BYTES.
    """
    if isinstance(value, list):
        return value
    if not isinstance(value, str):
        raise DataError(f"{origin}: private_test_cases must be text; found {type(value).__name__}")
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        pass
    try:
        inflate = zlib.decompressobj()
        data = inflate.decompress(base64.b64decode(value, validate=True), MAX_BYTES)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise DataError(
            f"{origin}: private_test_cases are neither JSON nor base64 of zlib ({error})"
        ) from error
    if inflate.unconsumed_tail:
        raise DataError(f"{origin}: private_test_cases unpack to more than {MAX_BYTES} bytes")
    return _tests_of(data, origin)


def _tests_of(data: bytes, origin: str) -> list[dict]:
    try:
        text = data.decode() if data[:1] in b"[{" else _TextUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # whatever a damaged or hostile pickle makes the loader raise
        raise DataError(f"{origin}: private_test_cases: {error}") from error
    if not isinstance(text, str):
        raise DataError(
            f"{origin}: private_test_cases unpickle to {type(text).__name__}, expected JSON text"
        )
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: private_test_cases are not JSON inside ({error})") from error


class _TextUnpickler(pickle.Unpickler):
    """Loads text, numbers and plain containers; whatever would import a name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"the pickle names {module}.{name}; only text is accepted")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("the pickle refers to outside objects; only text is accepted")
