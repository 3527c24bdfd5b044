"""Damage to bytes, file names and values. Each function takes a numpy Generator, `rng`."""

import copy
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


def replace_by_folder(path):
    os.mkdir(path)


def replace_by_dead_link(path):
    os.symlink("does/not/exist", path)


KINDS = [replace_by_folder, replace_by_dead_link]

NAMES = ["n" * 240, "=1+1", "-rf", "a'b\"c;$(id)`", os.fsdecode(b"caf\xe9\xff"), "a,b", "e\u0301"]
VALUES = [None, True, 0, -1, 10**30, 0.5, float("nan"), float("inf"), [], {}, [[]], {"a": 1}]
VALUES += ["", " ", "a\nb", "x" * 40_000, "../../x", "/etc/passwd", "nan", "1e999", "\x1b[2J"]


def paths_in(value, path=()):
    """Paths to all entries of nested dicts and lists."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value[:3]):
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from paths_in(inner, (*path, key))


def odd_entry(value, rng):
    """(name of the fault, a copy of nested dicts with one entry removed or replaced)."""
    value = copy.deepcopy(value)
    path = choose(rng, paths_in(value))
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    if rng.random() < 0.2:
        del parent[path[-1]]
        return f"without {path[0]}", value
    parent[path[-1]] = choose(rng, VALUES)
    return f"entry of {path[0]}", value
