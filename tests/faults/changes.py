"""Damage to bytes and file names. Each function takes a numpy Generator, `rng`."""

import os


def choose(rng, options):
    options = list(options)
    return options[int(rng.integers(len(options)))]


def place(data, rng):
    """A position in the bytes; half of the positions are in the first kilobyte, the header."""
    end = len(data) if rng.random() < 0.5 else min(len(data), 1024)
    return int(rng.integers(max(end, 1)))


def flip(data, rng):
    data = bytearray(data)
    for _ in range(int(rng.choice([1, 1, 1, 3, 20]))):
        data[place(data, rng)] ^= 1 << int(rng.integers(8))
    return bytes(data)


def truncate(data, rng):
    return data[: place(data, rng)]


def blank(data, rng):
    at, n = place(data, rng), int(rng.integers(1, 4096))
    return data[:at] + bytes(len(data[at : at + n])) + data[at + n :]


def insert(data, rng):
    at = place(data, rng)
    return data[:at] + rng.bytes(int(rng.integers(1, 300))) + data[at:]


def other_kind(data, rng):
    heads = b"", b"%PDF-1.4\n", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b"RIFF\x24\0\0\0AVI ", b"{}"
    return choose(rng, heads) + data[: int(rng.integers(100))]


BYTES = [flip] * 5 + [truncate] * 3 + [blank] * 3 + [insert, other_kind]


def damage(data, rng):
    """(name of the fault, damaged bytes)."""
    fault = choose(rng, BYTES)
    return fault.__name__, fault(data, rng)


KINDS = [os.mkdir, lambda path: os.symlink("does/not/exist", path)]

NAMES = ["n" * 240, "=1+1", "-rf", "a'b\"c;$(id)`", os.fsdecode(b"caf\xe9\xff"), "a,b", "e\u0301"]
