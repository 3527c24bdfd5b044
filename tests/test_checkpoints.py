"""Damage and deceit in what torch.save wrote: refused in one line, or the very same numbers."""

import pickle
import random
import shutil
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import published_model

from echofocus_core.base import pickles
from echofocus_core.base.checkpoints import WeightsError, load_safely, save
from tests.faults.pickles import HOSTILE, hostile_archive, hostile_old

SAVED = {
    "model_state_dict": {
        "a": torch.arange(30.0),
        "b": torch.linspace(0, 1, 12).reshape(3, 4).bfloat16(),
        "part": torch.arange(30.0)[3:9],
    },
    "perf_log": [[1, np.float64(0.5), np.arange(3)]],
    "echofocus": {"labels": ["x", "y"], "unlearnt": []},
}


def same(a, b):
    """Whether two things read from checkpoints are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and a == b


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "best_checkpoint.pt"
    torch.save(SAVED, path)
    return path


def refused(path, message=""):
    with pytest.raises(WeightsError) as refusal:
        load_safely(path)
    text = str(refusal.value)
    assert message in text and path.name in text and text.isprintable(), text
    return text


def test_every_flipped_bit_is_refused_or_harmless(small):
    """A bit of every fifth byte: headers, pickle, numbers, padding and directory alike."""
    whole, rng, harmless = small.read_bytes(), random.Random(7), 0
    assert same(load_safely(small), SAVED)
    for i in range(rng.randrange(5), len(whole), 5):
        damaged = bytearray(whole)
        damaged[i] ^= 1 << rng.randrange(8)
        small.write_bytes(damaged)
        try:
            assert same(load_safely(small), SAVED), f"byte {i}"
            harmless += 1
        except WeightsError as error:
            assert "best_checkpoint.pt" in str(error)
    assert 0 < harmless < len(whole) / 5 / 2  # what no reader looks at


def test_flipped_numbers_of_a_model_are_named(tmp_path):
    """A published model: torch.load reads each of these files, and other numbers in them."""
    published_model(tmp_path / "m", 3)
    path, rng = tmp_path / "m" / "best_checkpoint.pt", random.Random(1)
    with zipfile.ZipFile(path) as archive:
        places = [(x.header_offset + 200, x.file_size) for x in archive.infolist()]
    start, size = max(places, key=lambda place: place[1])
    for _ in range(8):
        at = start + rng.randrange(size - 400)
        with open(path, "rb+") as f:
            f.seek(at)
            byte = f.read(1)[0]
            f.seek(at)
            f.write(bytes([byte ^ 64]))
            f.flush()
            torch.load(path, weights_only=False)
            assert "do not have their checksum" in refused(path, "download it again")
            f.seek(at)
            f.write(bytes([byte]))
    load_safely(path)


@pytest.mark.parametrize("end", [0, 1, 3, 50, 0.5, -1, -23, -99])
def test_cut_files(small, end):
    whole = small.read_bytes()
    small.write_bytes(whole[: int(end * len(whole)) if isinstance(end, float) else end])
    refused(small)


def rebuilt(path, change=lambda name, data: data, more=(), method=zipfile.ZIP_STORED):
    """The archive written anew, with true checksums, some records changed and some more."""
    other = path.with_name("rebuilt.pt")
    with zipfile.ZipFile(path) as a, zipfile.ZipFile(other, "w", method) as b:
        for info in a.infolist():
            b.writestr(info.filename, change(info.filename, a.read(info)))
        for name, data in more:
            b.writestr(name, data)
    return other


def in_pickle(old, new):
    def change(name, data):
        if name.endswith("data.pkl"):
            assert data.count(old) == 1
            return data.replace(old, new)
        return data

    return change


def test_zip_tricks(small):
    """What two readers may read in two ways, each with the checksums in order."""
    assert same(load_safely(rebuilt(small)), SAVED)
    refused(rebuilt(small, method=zipfile.ZIP_DEFLATED), "compressed")
    data = ("best_checkpoint/data/0", bytes(120))
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = rebuilt(small, more=[data])
    refused(twice, "twice")
    refused(rebuilt(small, more=[(data[0].upper(), data[1])]), "twice")

    whole = rebuilt(small).read_bytes()
    path = small.with_name("tricked.pt")
    for changed, message in (
        (whole + b"x", "its end is missing"),
        (b"PK\x03\x04" + whole, "not where it should be"),
        (whole[:-2] + b"\x04\0more", "its end is missing"),
        (whole[:26] + b"\x01\0" + whole[28:], "not where its directory says"),
        (whole[:8] + b"\x08\0" + whole[10:], "not where its directory says"),
        (torch_end(small, 24, 1), "contradicts itself"),
        (torch_end(small, 48, 1), "contradicts itself"),
        (torch_end(small, 64, 1), "contradicts itself"),
    ):
        path.write_bytes(changed)
        refused(path, message)


def torch_end(path, at, more):
    """A file of torch's with a number of its last 98 bytes, where 64-bit sizes stand, changed."""
    whole = path.read_bytes()
    assert whole[-98:-94] == b"PK\x06\x06"
    end = bytearray(whole[-98:])
    (value,) = struct.unpack("<Q", end[at : at + 8])
    end[at : at + 8] = struct.pack("<Q", value + more)
    return whole[:-98] + end


def test_storages_that_claim_what_they_have_not(small):
    """Sizes, offsets and strides beyond a tensor's bytes, with the checksums in order."""
    torch.save({"model_state_dict": {"a": torch.arange(7.0)}}, small)
    size, geometry = b"K\x07tq\x09Q", b"QK\x00K\x07\x85q\x0aK\x01\x85"
    huge = b"\x8a\x08" + struct.pack("<q", 10**15)
    for old, new in (
        (size, b"K\x08tq\x09Q"),
        (size, huge + b"tq\x09Q"),
        (geometry, b"QK\x00" + huge + b"\x85q\x0aK\x01\x85"),
        (geometry, b"QK\x01K\x07\x85q\x0aK\x01\x85"),
        (geometry, b"Q" + huge + b"K\x07\x85q\x0aK\x01\x85"),
        (geometry, b"QJ\xff\xff\xff\xffK\x07\x85q\x0aK\x01\x85"),
        (geometry, b"QK\x00K\x07\x85q\x0aK\x02\x85"),
        (geometry, b"QK\x00K\x07\x85q\x0aJ\xff\xff\xff\xff\x85"),
        (b"torch\nFloatStorage\n", b"torch\nDoubleStorage\n"),
        (b"torch\nFloatStorage\n", b"torch\nNoStorage\n"),
    ):
        refused(rebuilt(small, in_pickle(old, new)))


def test_arrays_that_claim_memory(small):
    """numpy's own pickles begin with an empty array; another shape would be taken at its word."""
    torch.save({"model_state_dict": {}, "a": np.arange(3)}, small)
    huge = b"\x8a\x08" + struct.pack("<q", 10**9)
    refused(rebuilt(small, in_pickle(b"K\x00\x85q", huge + b"\x85q")))


def test_what_numpy_wrote_comes_back_and_is_written_as_numpy_s(small):
    """Stand-ins read it; what they made is saved as if numpy itself had made it."""
    kinds = [np.ones(3, kind) for kind in ("f4", "f8", "i4", "i8", "u4", "?", "u1")]
    saved = {"arrays": kinds, "numbers": [x[1] for x in kinds], "f": np.ones((2, 3), order="F").T}
    saved["in"] = [({"a": np.array(3.0)},)]
    save(saved, small)
    read = load_safely(small)
    assert {type(x) for x in [*read["arrays"], read["f"], *read["in"][0][0].values()]} == {
        np.ndarray
    }
    assert type(read["arrays"][0].sum()) is np.float32
    save(read, small.with_name("again.pt"))
    assert same(load_safely(small.with_name("again.pt")), saved)
    assert b"common" not in small.with_name("again.pt").read_bytes()


def test_what_torch_s_own_reader_takes_is_taken(small, monkeypatch):
    """Such as a MultiStepLR's state, whose milestones are a Counter; each value is counted once."""
    monkeypatch.setattr(pickles, "MOST_VALUES", 2500)
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), 0.1)
    for saved in (
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5]).state_dict(),
        {"a": {1, 2}, "b": 1j, "c": bytearray(b"\xffx"), "d": bytearray(), "e": torch.strided},
        {"ids": {"x": {"y": [str(i) for i in range(1000)]}}},
    ):
        for new in (True, False):
            torch.save(saved, small, _use_new_zipfile_serialization=new)
            assert same(load_safely(small), saved)
    numbers = {"a": torch.arange(5).to(torch.uint16)[1:]}
    torch.save(numbers | {"b": torch.zeros(2).untyped_storage()}, small)  # not in the old format
    assert same({k: v for k, v in load_safely(small).items() if k != "b"}, numbers)


def test_an_unsigned_tensor_beyond_its_storage(small):
    torch.save({"a": torch.zeros(7, dtype=torch.uint16)}, small)
    refused(rebuilt(small, in_pickle(b"QK\x00K\x07\x85", b"QK\x01K\x07\x85")))
    refused(rebuilt(small, in_pickle(b"uint16\n", b"int64\n")))
    refused(rebuilt(small, in_pickle(b"uint16\n", b"bits8\n")), "names torch.bits8")


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pickle_that_would_crash_or_never_end(small, kind):
    for data in (hostile_archive(kind), hostile_old(kind)):
        small.write_bytes(data)
        refused(small)


def test_old_format_says_that_it_has_no_checksums(small, capsys):
    torch.save(SAVED, small, _use_new_zipfile_serialization=False)
    assert same(load_safely(small), SAVED)
    assert "without checksums" in capsys.readouterr().out


def test_nothing_else_is_a_checkpoint(small):
    for data in (b"", b"PK", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"\x80\x02" * 999, b"{}"):
        small.write_bytes(data)
        refused(small)
    shutil.copy(small, small.with_name("x.pt"))
    refused(Path(small.parent, "gone.pt"), "no checkpoint")


def set_at(path, value):
    """A change of a checkpoint's dict: the entry at a path of keys becomes `value`, or goes."""

    def change(saved):
        *above, last = path
        for key in above:
            saved = saved[key]
        if value is None:
            del saved[last]
        else:
            saved[last] = value(saved[last]) if callable(value) else value

    return change


MOMENTS = ("optimizer_state_dict", "state", 0, "exp_avg")
STATES = {
    "a row too short": set_at(("perf_log", 0), [1]),
    "no row": set_at(("perf_log",), [[]]),
    "an epoch lost": set_at(("perf_log", 0, 0), 2),
    "a loss that is none": set_at(("perf_log", 0, 2), float("nan")),
    "an endless epoch": set_at(("perf_log", 0, 0), float("inf")),
    "no optimiser": set_at(("optimizer_state_dict",), None),
    "a moment that is none": set_at(MOMENTS, lambda x: x * float("nan")),
    "another shape": set_at(MOMENTS, lambda x: x[:1]),
    "a moment lost": set_at(MOMENTS, None),
    "a rate in words": set_at(("optimizer_state_dict", "param_groups", 0, "lr"), "fast"),
    "a plan in words": set_at(("scheduler_state_dict", "num_bad_epochs"), "many"),
    "a method as state": set_at(("scheduler_state_dict", "patience"), {"a": 1}),
    "a position beyond": set_at(("position", "studies"), 10**9),
    "a weight that is none": set_at(
        ("model_state_dict", "ff.bias"), lambda x: x * float("nan")
    ),
}  # fmt: skip


def test_a_run_goes_on_from_a_sound_state_alone(cohort, cli):
    line = ["train", "--task", "defect", "--encoder_depth", "0", "--epoch_lim"]
    assert cli(*line, "1")[0] == 0
    path = cohort / "trained_models" / "defect" / "last_checkpoint.pt"
    whole = path.read_bytes()
    for name, change in STATES.items():
        path.write_bytes(whole)
        saved = torch.load(path, weights_only=True)
        change(saved)
        save(saved, path)
        status, _, err = cli(*line, "2")
        assert status == 1 and err.count("\n") == 1 and "last_checkpoint.pt is damaged" in err, name
    path.write_bytes(whole)
    assert cli(*line, "2")[0] == 0


def test_a_pickle_alone_is_refused_without_a_warning_of_torch(tmp_path):
    path = tmp_path / "best_checkpoint.pt"
    path.write_bytes(pickle.dumps({"model_state_dict": Path}, protocol=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(path)


@pytest.mark.parametrize("size", [0, 50, 200, 1500])
def test_a_full_disk_is_said_by_the_system(tmp_path, size):
    """torch's own error would come on top: a position that it did not expect."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        with pytest.raises(OSError, match="File too large"):
            save(SAVED, tmp_path / "best_checkpoint.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
