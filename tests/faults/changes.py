"""Damage to bytes, file names and values. Each function takes a numpy Generator, `rng`."""

import copy
import os

EDGES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1]


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


def edge(data, rng):
    at, size = place(data, rng), int(rng.choice([1, 2, 4, 8]))
    number = choose(rng, EDGES) & ((1 << 8 * size) - 1)
    return data[:at] + number.to_bytes(size, str(rng.choice(["little", "big"]))) + data[at + size :]


def insert(data, rng):
    at = place(data, rng)
    return data[:at] + rng.bytes(int(rng.integers(1, 300))) + data[at:]


def delete(data, rng):
    at = place(data, rng)
    return data[:at] + data[at + int(rng.integers(1, 300)) :]


def empty(data, rng):
    return b""


def noise(data, rng):
    return rng.bytes(int(rng.integers(1, 5000)))


def other_kind(data, rng):
    heads = b"%PDF-1.4\n", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b"RIFF\x24\0\0\0AVI ", b"{}"
    return choose(rng, heads) + data[: int(rng.integers(100))]


BYTES = [flip] * 5 + [truncate] * 3 + [edge] * 3 + [blank, insert, delete, empty, noise, other_kind]


def damage(data, rng):
    """(name of the fault, damaged bytes)."""
    fault = choose(rng, BYTES)
    return fault.__name__, fault(data, rng)


def replace_by_folder(path):
    os.mkdir(path)


def replace_by_dead_link(path):
    os.symlink("does/not/exist", path)


KINDS = [replace_by_folder, replace_by_dead_link]

NAMES = [
    "n" * 240, "=1+1", "-rf", "%s%n", "a'b\"c;$(id)`", os.fsdecode(b"caf\xe9\xff"), " lead",
    "trail.", "a,b", "\u0421\u0410", "e\u0301", "A" * 40 + " b",
]  # fmt: skip
TEXTS = [
    "", " ", "a\nb", "x" * 40_000, "../../x", "/etc/passwd", "=1+1", r"$\foo{$", "nan", "1e999",
    "-1", "0x10", "%s%n", "\u0661\u0662", "None", "1,5", "[[[[", "\x1b[2J",
]  # fmt: skip


def odd_value(rng):
    """A JSON or torch value that is wrong in most places."""
    numbers = [None, True, 0, -1, 10**30, 0.5, float("nan"), float("inf"), 1e308]
    return choose(rng, [*numbers, [], {}, [[]], {"a": 1}, [None], *TEXTS])


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
    parent[path[-1]] = odd_value(rng)
    return f"entry of {path[0]}", value
