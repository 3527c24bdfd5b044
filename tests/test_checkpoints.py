"""Files written by torch.save: damage is detected, and no code in them runs."""

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from echofocus_core.base.checkpoints import WeightsError, load_safely, save

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
    """Whether two values from checkpoints are equal to the bit."""
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


def refusal(path, message=""):
    with pytest.raises(WeightsError) as error:
        load_safely(path)
    text = str(error.value)
    assert message in text and path.name in text and text.isprintable(), text
    return text


def test_every_flipped_bit_is_refused_or_harmless(small):
    """Flip one bit of every fifth byte of headers, pickle, numbers, padding and directory."""
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
    assert 0 < harmless < len(whole) / 5 / 2  # bytes that no reader uses


def test_numpy_values_are_read_and_saved_again(small):
    kinds = [np.ones(3, kind) for kind in ("f4", "f8", "i4", "i8", "u4", "?", "u1")]
    saved = {"arrays": kinds, "numbers": [x[1] for x in kinds], "f": np.ones((2, 3), order="F").T}
    saved["in"] = [({"a": np.array(3.0)},)]
    save(saved, small)
    assert same(load_safely(small), saved)
    save(load_safely(small), small)
    assert same(load_safely(small), saved)
    assert b"echofocus" not in small.read_bytes()


class Code:
    def __reduce__(self):
        return open, ("ran", "w")


@pytest.mark.parametrize("new", [True, False])
def test_code_in_a_file_does_not_run(small, monkeypatch, new):
    monkeypatch.chdir(small.parent)
    torch.save(SAVED | {"more": Code()}, small, _use_new_zipfile_serialization=new)
    assert "io.open" in refusal(small)
    small.write_bytes(pickle.dumps(Code()))
    refusal(small)
    assert not Path("ran").exists()


def test_old_format_has_no_checksums(small, capsys):
    torch.save(SAVED, small, _use_new_zipfile_serialization=False)
    assert same(load_safely(small), SAVED)
    assert "without checksums" in capsys.readouterr().out


def test_truncated_and_other_files_are_refused(small):
    whole = small.read_bytes()
    truncated = [whole[:end] for end in (1, 50, len(whole) // 2, -1, -23)]
    for data in (*truncated, b"", b"PK\x05\x06" + bytes(18), b"\x80\x02" * 999, b"{}"):
        small.write_bytes(data)
        refusal(small)
    refusal(Path(small.parent, "gone.pt"), "no checkpoint")
