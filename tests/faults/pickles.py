"""Pickles by hand, which torch's reader of weights takes: crashes, hangs and claims of memory."""

import io
import pickle
import struct
import zipfile

import torch


def named(name):
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def text(word):
    return b"X" + struct.pack("<I", len(word)) + word.encode()


RECORD = named("numpy dtype") + b"]" + text("a") + text("O") + b"\x86a\x85R"  # holds a pointer
WITHIN = (
    named("numpy dtype") + text("f8") + b"\x89\x88\x87R(K\x03" + text("<") + RECORD
    + b"K\x01\x85\x86NNK\x08K\x08K\x00tb"
)  # fmt: skip
POINTER = named("_codecs encode") + text("AAAAAA\0\0") + text("latin1") + b"\x86R"
SCALAR = named("numpy._core.multiarray scalar")
HOSTILE = {
    "a pointer": SCALAR + RECORD + POINTER + b"\x86R",
    "a pointer within": named("numpy ndarray") + b"K\x01\x85" + WITHIN + POINTER + b"\x87R",
    "gigabytes of zeros": SCALAR + named("numpy dtype") + text("V2000000000") + b"\x85R\x85R",
    "gigabytes of bytes": named("__builtin__ bytearray") + b"J\xff\xff\xff\x7f\x85R",
    "gigabytes, untyped": named("torch.storage UntypedStorage") + b"J\xff\xff\xff\x7f\x85R",
    "gigabytes of bytes, made anew": b"]" + named("builtins bytearray") + b"q\x00J\xff\xff\xff\x7f"
    + b"\x85q\x01Rah\x00h\x01Ra",
    "gigabytes of numbers": named("torch FloatTensor") + b"J\xff\xff\xff\x7f\x85R",
    "a key without end": b"})q\x00"
    + b"".join(b"h%ch%c\x86q%c" % (k, k, k + 1) for k in range(45)) + b"K\x01s",
    "lists without end": b"]q\x00"
    + b"".join(b"]q%c(h%ch%ce" % (k + 1, k, k) for k in range(45)),
    "a list that fills another later": b"]q\x00]q\x01(h\x00h\x00eh\x00h\x01a",
    "a deep key": b"}" + b")" + b"\x85" * 100_000 + b"K\x01s",
    "a slow spelling": named("_codecs encode") + text("\u1234") + text("punycode") + b"\x86R",
    "a long text again and again": b"(" + named("_codecs encode") + b"q\x00" + text("a" * 10**6)
    + text("latin1") + b"\x86q\x01R" + b"h\x00h\x01R" * 1000 + b"t",
}  # fmt: skip


def hostile_archive(kind):
    """A file as torch.save writes it, but for its pickle."""
    buffer, other = io.BytesIO(), io.BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer) as a, zipfile.ZipFile(other, "w") as b:
        for name in a.namelist():
            own = b"\x80\x02" + HOSTILE[kind] + b"."
            b.writestr(name, own if name.endswith("data.pkl") else a.read(name))
    return other.getvalue()


def hostile_old(kind):
    """The same in torch's old format."""
    before = torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}
    parts = [pickle.dumps(part, 2) for part in before] + [b"\x80\x02" + HOSTILE[kind] + b"."]
    return b"".join(parts) + pickle.dumps([], 2)
