"""What is done to files: to their bytes, their names, their kind, and to values within them."""

import os

EDGES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1]


def place(data, rng):
    """A position in the bytes; the first kilobyte, where headers are, is as likely as the rest."""
    end = len(data) if rng.random() < 0.5 else min(len(data), 1024)
    return int(rng.integers(max(end, 1)))


def flip(data, rng):
    out = bytearray(data)
    for _ in range(int(rng.choice([1, 1, 1, 3, 20]))):
        if out:
            out[place(out, rng)] ^= 1 << int(rng.integers(8))
    return bytes(out)


def truncate(data, rng):
    return data[: place(data, rng)]


def blank(data, rng):
    at, n = place(data, rng), int(rng.integers(1, 4096))
    return data[:at] + bytes([int(rng.choice([0, 255]))]) * len(data[at : at + n]) + data[at + n :]


def edge(data, rng):
    at, size = place(data, rng), int(rng.choice([1, 2, 4, 8]))
    number = EDGES[int(rng.integers(len(EDGES)))] & ((1 << 8 * size) - 1)
    return data[:at] + number.to_bytes(size, str(rng.choice(["little", "big"]))) + data[at + size :]


def insert(data, rng):
    at = place(data, rng)
    return data[:at] + rng.bytes(int(rng.integers(1, 300))) + data[at:]


def delete(data, rng):
    at = place(data, rng)
    return data[:at] + data[at + int(rng.integers(1, 300)) :]


def splice(data, rng):
    at, other, n = place(data, rng), place(data, rng), int(rng.integers(1, 2000))
    return data[:at] + data[other : other + n] + data[at + n :]


def repeat(data, rng):
    return data * int(rng.integers(2, 5))


def empty(data, rng):
    return b""


def noise(data, rng):
    return rng.bytes(int(rng.integers(1, 5000)))


def other_kind(data, rng):
    heads = (
        b"%PDF-1.4\n",
        b"PK\x03\x04",
        b"\x89HDF\r\n\x1a\n",
        b"RIFF\x24\0\0\0AVI ",
        b"{}",
        b"\0" * 64,
    )
    return heads[int(rng.integers(len(heads)))] + data[: int(rng.integers(100))]


BYTES = [flip] * 5 + [truncate] * 2 + [edge] * 3
BYTES += [blank, insert, delete, splice, repeat, empty, noise, other_kind]


def damaged(data, rng):
    """(name of the fault, bytes)."""
    fault = BYTES[int(rng.integers(len(BYTES)))]
    return fault.__name__, fault(data, rng)


# ------------------------------------------------------------------------------ kinds and names


def fifo(path):
    os.mkfifo(path)


def folder(path):
    os.mkdir(path)


def nowhere(path):
    os.symlink("is/not/there", path)


def itself(path):
    os.symlink(os.path.basename(path), path)


def device(path):
    os.symlink("/dev/zero", path)


KINDS = [fifo, folder, nowhere, itself, device]

ESCAPE = "\x1b[2J\x1b]0;owned\x07"
NAMES = [  # of files and folders; each is one that a file system takes
    "a\nb", ESCAPE.replace("/", ""), "n" * 240, "=1+1", "-rf", "%s%n%p", "\u202egpj",
    "a'b\"c;$(id)`",
    os.fsdecode(b"caf\xe9\xff"), " lead", "trail.", "a,b", "\u0421\u0410", "e\u0301",
]  # fmt: skip

# ------------------------------------------------------------------------------------- values

TEXTS = [
    "", " ", "\0", "a\0b", "a\nb\r\nc", ESCAPE, "x" * 300_000, "\ud800", "../../x", "/etc/passwd",
    "=1+1", r"$\foo{$",
    "nan", "1e999", "-1", "0x10", "%s%s%n", "\u0661\u0662", "None", "[" * 2000,
]  # fmt: skip


def nested(depth, kind=list):
    value = kind()
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


def odd_value(rng):
    """A value that does not belong where it is put."""
    values = [
        None, True, 0, -1, 10**30, 2**63, 0.5, float("nan"), float("inf"), 1e308, [], {}, [[]],
        {"a": 1}, [None], b"\xff\0", (1, 2), {1: 2}, nested(60), nested(60, dict), *TEXTS,
    ]  # fmt: skip
    return values[int(rng.integers(len(values)))]
