"""Files written by torch.save: no code in them runs, and damage is detected.

torch.load does not compare the checksums in the file, so they are compared here first.
"""

import io
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from echofocus_core.base.console import RUN, UserError, clean_text
from echofocus_core.base.files import atomic_path


class WeightsError(UserError):
    """A model file that is missing or unusable; the message names the file and the remedy."""


def save(saved, path):
    """Write a checkpoint atomically. Raises OSError.

    It is built in memory, since torch hides the reason of an error when the disk is full.
    """
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


# ------------------------------------------------------------------------------------------- read


class PlainDtype:
    """Replaces numpy.dtype while reading: only numbers, since other types may contain pointers."""

    def __init__(self, name, *_):
        self.dtype = np.dtype(name)
        if not isinstance(name, str) or self.dtype.kind not in "biuf":
            raise ValueError(f"arrays of {name} are not supported")

    def __setstate__(self, state):
        if state[1] not in ("<", "|"):
            raise ValueError("big-endian arrays are not supported")


class PlainArray(np.ndarray):
    """Replaces numpy.ndarray while reading; saved as an ordinary array."""

    def __setstate__(self, state):
        version, shape, kind, fortran, data = state
        super().__setstate__((version, shape, kind.dtype, fortran, data))

    def __reduce__(self):
        return np.asarray(self).__reduce__()


def empty_array(*_):
    return PlainArray(0)


def scalar(kind, data):
    return np.frombuffer(data, kind.dtype)[0]


NUMPY = [(PlainDtype, "numpy.dtype"), (PlainArray, "numpy.ndarray")]  # in published checkpoints
for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1 and 2
    NUMPY += [(empty_array, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]


def load_safely(path):
    """The content of a file written by torch.save, on the CPU; no code in it runs.

    Raises WeightsError if the file is missing or damaged, or contains anything but tensors,
    arrays, numbers and text.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no checkpoint {path}")
    try:
        if is_zip(path):
            check_archive(path)
        with torch.serialization.safe_globals(NUMPY), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = torch.load(path, map_location="cpu", weights_only=True)
        if not is_zip(path):
            RUN.note(f"{path}: old torch format without checksums; damage is not detected")
        return saved
    except (OSError, MemoryError, WeightsError):
        raise
    except Exception as error:  # torch and zipfile raise many types on damaged files
        foreign = re.search(r"(?:GLOBAL|Trying to \w+) (\S+)", str(error))
        reason = f"it contains {clean_text(foreign[1])}" if foreign else "it is not a checkpoint"
        raise WeightsError(f"{path} cannot be read safely and was refused: {reason}") from error


def is_zip(path):
    """Whether the file begins like a zip file; torch.load tests the same bytes."""
    with open(path, "rb") as f:
        return f.read(4) == b"PK\x03\x04"


def check_archive(path):
    """WeightsError unless a zip file's records are uncompressed, unique and match their CRC-32."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {info.filename.casefold() for info in archive.infolist()}
            if len(names) < len(archive.infolist()):
                fault = "it contains a record twice"
            elif any(info.compress_type for info in archive.infolist()):
                fault = "its records are compressed"
            elif name := archive.testzip():
                fault = f"{clean_text(name)} does not match its checksum"
            else:
                return
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # zipfile raises many types on damaged files
        fault = clean_text(error)
    raise WeightsError(
        f"{path} is damaged ({fault}); restore it from a backup, download it again, or train again"
    )


# ----------------------------------------------------------------------------------------- tensors


def load_strictly(model, state, path, kind):
    """Load `state` into `model`, built on the meta device, as float32.

    Integer buffers (counters of batch normalisation) keep their initial values. Raises WeightsError
    for missing or unexpected names, wrong shapes, and values that are not finite.
    """
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items() if v.is_floating_point()}
    given = {k: describe(v) for k, v in state.items()}
    wrong = [f"missing {k}" for k in expected if k not in given]
    wrong += [f"unexpected {ascii(str(k))[1:-1][:60]}" for k in given if k not in expected]
    wrong += [
        f"{k} is {given[k]}, not {shape}"
        for k, shape in expected.items()
        if given.get(k, shape) != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise WeightsError(f"{path} does not fit {kind}: {'; '.join(wrong[:5])}{more}")
    model.load_state_dict({k: v.detach().to(torch.float32) for k, v in state.items()}, assign=True)
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise WeightsError(
                f"{path} has weights that are not finite ({name}): it is damaged or its training "
                "diverged"
            )


def describe(value):
    """The shape of a dense floating-point tensor; a description of any other value."""
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested
    if not plain or not value.is_floating_point():
        return f"a tensor of {value.dtype} on {value.device.type}, {value.layout}"
    return tuple(value.shape)
