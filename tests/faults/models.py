"""Areas checkpoints and archives: model files that are damaged, or made to run something."""

import copy
import io
import os
import pickle
import shutil
import stat
import struct
import warnings
import zipfile
from functools import cache
from pathlib import Path

import torch

from tests.faults.mutations import KINDS, damaged, odd_value
from tests.faults.pickles import HOSTILE, hostile_archive, hostile_old
from tests.faults.stores import compare, home, predict_line, small_cohort
from tests.faults.worker import Case, one_line, run


def base(area):
    return home()


class Attack:
    """What a pickle runs that is loaded without care."""

    def __reduce__(self):
        return os.system, ("touch ../PWNED",)


@cache
def whole(name="best"):
    path = home() / "trained_models" / "defect" / f"{name}_checkpoint.pt"
    return path.read_bytes(), torch.load(path, weights_only=True)


def places(value, path=()):
    """Paths to everything in nested dicts and lists."""
    entries = value.items() if isinstance(value, dict) else enumerate(value[:3])
    for key, inner in entries:
        yield (*path, key)
        if isinstance(inner, dict | list) and inner:
            yield from places(inner, (*path, key))


def odd_entry(saved, rng):
    """A dict of a checkpoint with one entry that does not belong, or without it; the fault."""
    saved = copy.deepcopy(saved)
    found = list(places(saved))
    own = [p for p in found if p[0] != "model_state_dict" or len(p) == 1]
    found = own if rng.random() < 0.7 else found
    path = found[int(rng.integers(len(found)))]
    holder = saved
    for key in path[:-1]:
        holder = holder[key]
    draw, old = rng.random(), holder[path[-1]]
    if draw < 0.15:
        del holder[path[-1]]
    elif draw < 0.4 and torch.is_tensor(old):
        changes = [
            old.flatten()[:0], old.double(), old.half(), old * float("nan"), old.flatten(),
            old.to(torch.int8), torch.zeros(1, *old.shape), old.to_sparse(),
            old.expand(3, *old.shape), old.to("meta"),
        ]  # fmt: skip
        holder[path[-1]] = changes[int(rng.integers(len(changes)))]
    else:
        holder[path[-1]] = odd_value(rng)
    return f"entry: {path[0]}", saved


def saved_bytes(saved):
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return buffer.getvalue()


def attack(rng):
    """(fault, bytes) of a file that would run a program."""
    draw = rng.integers(6)
    if draw > 3:
        kind = list(HOSTILE)[int(rng.integers(len(HOSTILE)))]
        return f"attack: {kind}", (hostile_archive if draw == 4 else hostile_old)(kind)
    if draw == 0:
        return "attack: pickle", pickle.dumps({"model_state_dict": Attack()})
    if draw == 1:
        return "attack: torch", saved_bytes({"model_state_dict": {}, "echofocus": Attack()})
    if draw == 2:
        deep = b"\x80\x02" + b"](" * 50_000 + b"e" * 50_000 + b"."
        return "attack: nested", deep
    buffer = io.BytesIO(whole()[0])
    with zipfile.ZipFile(buffer, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = archive.namelist()[0]
        archive.writestr(name, pickle.dumps(Attack()))
    return "attack: record twice", buffer.getvalue()


def damaged_model(data, rng):
    """(fault, bytes, whether a checksum shows the damage) of a checkpoint."""
    draw = rng.random()
    if draw < 0.55:
        if rng.random() < 0.5:  # an exponent bit of some weight
            data = bytearray(data)
            first_third = len(data) // 50, len(data) // 3  # then come the optimiser's moments
            data[int(rng.integers(*first_third))] ^= 64 if rng.random() < 0.7 else 1 << 3
            return "bit of a weight", bytes(data), True
        fault, data = damaged(data, rng)
        return fault, data, True
    if draw < 0.9:
        fault, saved = odd_entry(whole()[1], rng)
        try:
            return fault, saved_bytes(saved), False
        except Exception:  # torch does not save every nonsense
            return "empty", b"", False
    return *attack(rng), False


def checkpoints(rng, here, base):
    """best_checkpoint.pt for predict and inspect; last_checkpoint.pt when a training goes on."""
    small_cohort(here, base)
    os.unlink(here / "trained_models")
    folder = here / "trained_models" / "defect"
    shutil.copytree(base / "trained_models" / "defect", folder)
    draw = rng.random()
    if draw < 0.25:
        fault, data, _ = damaged_model(whole("last")[0], rng)
        (folder / "last_checkpoint.pt").write_bytes(data)
        for i in range(5, 24):
            shutil.copy2(base / "emb" / f"s{i}.hdf5", here / "emb")
        result = run("train", "--task", "defect", "--epoch_lim", "1")
        return Case(f"resume: {fault}", one_line(result, "last_checkpoint", "defect"))
    path = folder / "best_checkpoint.pt"
    if draw < 0.3:
        kind = KINDS[int(rng.integers(len(KINDS)))]
        path.unlink()
        kind(path)
        fault, shown = kind.__name__, False
    else:
        fault, data, shown = damaged_model(whole()[0], rng)
        path.write_bytes(data)
    inspect = draw < 0.45
    line = ["inspect", "trained_models/defect/best_checkpoint.pt"] if inspect else predict_line()
    result = run(*line)
    complaint = one_line(result, "best_checkpoint", "defect")
    if not complaint and Path("../PWNED").exists():
        complaint = "CODE OF THE FILE RAN"
    if not complaint and result.status == 0 and shown and not inspect:
        complaint = compare(base, "", ("s0", "s1", "s2", "s3", "s4"))
    return Case(fault, complaint)


# --------------------------------------------------------------------------------------- archives


def member(archive, rng):
    """A member that no honest archive has."""
    names = [
        "../x",
        "/tmp/x",
        "a/../../x",
        "C:\\x",
        "a\0b",
        "x" * 300,
        "a\nb",
        "best_checkpoint.pt",
    ]
    name = names[int(rng.integers(len(names)))]
    info = zipfile.ZipInfo("x")
    info.filename = info.orig_filename = name
    draw = rng.random()
    if draw < 0.2:
        info.filename, info.external_attr = "link", (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
        return "link"
    if draw < 0.4:
        info.filename, info.compress_type = "big.csv", zipfile.ZIP_DEFLATED
        archive.writestr(info, bytes(50 << 20))
        return "bomb"
    if draw < 0.5:
        for i in range(2000):
            archive.writestr(f"f{i}", "")
        return "members"
    archive.writestr(info, "x")
    return "path"


def claimed_size(data, rng):
    """The directory of a zip says another size of a member."""
    at = data.rfind(b"PK\x01\x02")
    if at < 0:
        return data
    size = struct.pack("<I", int(rng.choice([0, 1, 2**31, 2**32 - 2])))
    return data[: at + 24] + size + data[at + 28 :]


def archive_bytes(rng):
    buffer, fault = io.BytesIO(), "whole"
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("z/best_checkpoint.pt", whole()[0])
        archive.writestr("z/README.md", "hello")
        if rng.random() < 0.4:
            fault = member(archive, rng)
    data = buffer.getvalue()
    if fault == "whole":
        if rng.random() < 0.2:
            return "claimed size", claimed_size(data, rng)
        fault, data = damaged(data, rng)
    return fault, data


def archives(rng, here, base):
    """download of a zip or .pt file: a model that gives the same numbers, or nothing at all."""
    small_cohort(here, base)
    os.unlink(here / "trained_models")
    draw = rng.random()
    if draw < 0.7:
        name, (fault, data) = "z.zip", archive_bytes(rng)
    else:
        name, (fault, data, _) = "z.pt", damaged_model(whole()[0], rng)
    Path(name).write_bytes(data)
    result = run("download", f"./{name}", "--model_name", "z")
    complaint = one_line(result, "z.zip", "z.pt", "z")
    there = (
        sorted(p.name for p in Path("trained_models").glob("*"))
        if Path("trained_models").exists()
        else []
    )
    if not complaint and Path("../PWNED").exists():
        complaint = "CODE OF THE FILE RAN"
    if not complaint and result.status and there:
        complaint = f"left behind by a refusal: {there}"
    if not complaint and not result.status:
        again = run("predict", "--model_name", "z", "--task", "defect", "--out", "p.csv")
        shown = not fault.startswith(("entry", "attack"))
        complaint = one_line(again, "z")
        if shown and again.status == 0:
            complaint = compare(base, complaint, ("s0", "s1", "s2", "s3", "s4"))
    return Case(fault, complaint)
