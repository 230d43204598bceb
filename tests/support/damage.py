"""What happens to files: each entry makes damaged bytes of those of a whole file."""

import random

import pytest

NOISE = random.Random(23).randbytes(10_000)


def _flip(data, share):
    """One bit changed, after so large a share of the bytes."""
    damaged = bytearray(data)
    damaged[int(share * len(data))] ^= 1
    return bytes(damaged)


CUT = {
    "empty": lambda data: b"",
    "one byte": lambda data: data[:1],
    "four bytes": lambda data: data[:4],
    "a hundred bytes": lambda data: data[:100],
    "a tenth": lambda data: data[: len(data) // 10],
    "half": lambda data: data[: len(data) // 2],
    "nine tenths": lambda data: data[: 9 * len(data) // 10],
    "all but a hundred bytes": lambda data: data[:-100],
    "all but one byte": lambda data: data[:-1],
}
FLIPPED = {
    "a bit near the start": lambda data: _flip(data, 0.02),
    "a bit at 30%": lambda data: _flip(data, 0.3),
    "a bit in the middle": lambda data: _flip(data, 0.5),
    "a bit at 70%": lambda data: _flip(data, 0.7),
}
FOREIGN = {
    "zeros": lambda data: bytes(len(data)),
    "noise": lambda data: NOISE,
    "noise at the start": lambda data: NOISE[:100] + data[100:],
    "a web page": lambda data: b"<!DOCTYPE html>\n<html>404 Not Found</html>\n",
    "the start of a zip": lambda data: b"PK\3\4" + bytes(500),
}


def damaged_by(*kinds):
    """Run a test for each of the ways in these tables, as its argument `damage`."""
    ways = {name: way for kind in kinds for name, way in kind.items()}
    return pytest.mark.parametrize("damage", ways.values(), ids=ways)
