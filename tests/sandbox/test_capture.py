"""What is kept of an output: head and tail, whole characters, exact counts."""

import random

import pytest

from megatron_sod.sandbox.capture import Stream


def feed(data, limit, seed=0):
    stream, chance = Stream(limit), random.Random(seed)
    while data:
        size = chance.randint(1, 50)
        stream.add(data[:size])
        data = data[size:]
    return stream


def test_short_output_is_whole():
    stream = feed(b"hello \xff", 100)
    assert (stream.text(), stream.num_bytes) == ("hello \ufffd", 7)


@pytest.mark.parametrize("size", [101, 150, 1000, 5000])
def test_long_output_keeps_both_ends_within_the_limit(size):
    data = bytes(97 + i % 26 for i in range(size))
    stream = feed(data, 100)
    text = stream.text()
    head, tail = text.split(f"\n[... {size - 100} bytes left out ...]\n")
    assert len(text) == 100 and stream.num_bytes == size
    assert data.startswith(head.encode()) and data.endswith(tail.encode())


@pytest.mark.parametrize("shift", range(5))
@pytest.mark.parametrize("letter", ["e", "\u00e9", "\u20ac", "\U0001f469"])
def test_cut_never_splits_a_character(letter, shift):
    stream = feed(b"x" * shift + letter.encode() * 400, 100, seed=shift)
    assert "\ufffd" not in stream.text()
    assert len(stream.text().encode()) <= 100


def test_memory_does_not_grow_with_the_output():
    stream = Stream(1000)
    for _ in range(1000):
        stream.add(b"y" * 1000)
    assert len(stream._head) + len(stream._tail) <= 4000
