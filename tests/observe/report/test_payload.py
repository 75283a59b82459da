"""Columns and JSON survive the packing.

Layer: pure. The page's own unpacking: test_browser.py.
"""

import numpy as np
import pytest

from megatron_sod.observe.report.payload import pack, unpack


def test_what_is_packed_is_unpacked():
    columns = {
        "a": np.arange(5, dtype=np.uint8),  # five bytes: the next column is padded to eight
        "b": np.array([1.5, -2.0, np.nan], np.float32),
        "none": np.zeros(0, np.int32),
        "c": np.array([-32768, 7], np.int16),
    }
    meta, back = unpack(pack({"name": "run ä", "list": [None, 1]}, columns))
    assert meta == {"name": "run ä", "list": [None, 1]}
    for name, column in columns.items():
        np.testing.assert_array_equal(back[name], column)
        assert back[name].dtype == column.dtype


def test_packing_is_deterministic():
    columns = {"a": np.arange(9, dtype=np.int32)}
    assert pack({"x": 1}, columns) == pack({"x": 1}, columns)


def test_the_text_can_stand_in_a_page():
    text = pack({"evil": "</script>"}, {})
    assert text.isascii() and "<" not in text


def test_a_type_that_a_page_cannot_look_into_is_refused():
    with pytest.raises(ValueError, match="int64"):
        pack({}, {"a": np.arange(3)})


def test_nan_is_not_written_as_json():
    with pytest.raises(ValueError):
        pack({"x": float("nan")}, {})
