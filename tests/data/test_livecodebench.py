"""Packed private tests: read when they are text, refused when they would run anything.

Layer: pure.
"""

import base64
import json
import os
import pickle
import zlib

import pytest

from megatron_sod.data import livecodebench
from megatron_sod.data.livecodebench import private_tests
from megatron_sod.errors import DataError

TESTS = [{"input": "1\n", "output": "2\n", "testtype": "stdin"}, {"input": "\u00fc", "output": ""}]


def _pack(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_json_text_of_every_protocol_is_read(protocol):
    assert private_tests(_pack(pickle.dumps(json.dumps(TESTS), protocol)), "r") == TESTS


@pytest.mark.parametrize("value", [TESTS, json.dumps(TESTS), _pack(json.dumps(TESTS).encode())])
def test_unpickled_forms_are_read_too(value):
    assert private_tests(value, "r") == TESTS


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_a_command_is_refused_and_does_not(tmp_path, protocol):
    mark = tmp_path / "ran"
    data = pickle.dumps(_Evil(mark), protocol)
    with pytest.raises(DataError, match="file row 3: .* only text is accepted"):
        private_tests(_pack(data), "file row 3")
    assert not mark.exists()
    pickle.loads(data)  # the same bytes do run under the ordinary loader
    assert mark.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("%%%", "neither JSON nor base64 of zlib"),
        (base64.b64encode(b"plain").decode(), "neither JSON nor base64 of zlib"),
        (_pack(pickle.dumps([1, 2])), "unpickle to list, expected JSON text"),
        (_pack(pickle.dumps("not json")), "not JSON inside"),
        (_pack(b"\x80\x04 broken"), "private_test_cases"),
        (7, "must be text; found int"),
    ],
)
def test_anything_else_is_refused_by_name(value, message):
    with pytest.raises(DataError, match=message):
        private_tests(value, "r")


def test_a_bomb_is_refused_before_it_unpacks(monkeypatch):
    monkeypatch.setattr(livecodebench, "MAX_BYTES", 10_000)
    with pytest.raises(DataError, match="more than 10000 bytes"):
        private_tests(_pack(b"0" * 1_000_000), "r")
