"""Read HDF5 files of unknown origin: nothing outside the file, and only up to a maximum size.

A file that breaks these rules raises one of UNREADABLE, with the reason.
"""

import io
import math
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from echofocus_core.base.console import clean_text

# Errors of h5py on damaged or malicious files, and errors of this module.
UNREADABLE = (OSError, KeyError, RuntimeError, TypeError, AttributeError, ValueError, MemoryError)

MOST_BYTES = 1 << 30  # per dataset: a study of 21,000 videos of 16 clips
MOST_CHUNKS = 100_000  # per dataset
MOST_ATTRIBUTE = 1 << 16  # bytes
FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
FILTERS |= {h5py.h5z.FILTER_LZF}  # others load code from a plugin folder


def open_hdf5(path):
    """The h5py.File, for reading. It needs no lock, since files are only replaced as a whole."""
    if not path.is_file():
        raise OSError("not a regular file")
    return h5py.File(path, "r", locking=False)


@contextmanager
def new_hdf5(path):
    """Yield an h5py.File to fill; it is written to `path` when the block ends. Raises OSError.

    It is built in memory, since HDF5 may crash the interpreter when the disk is full.
    """
    with io.BytesIO() as buffer:
        with h5py.File(buffer, "w") as f:
            yield f
        Path(path).write_bytes(buffer.getbuffer())


def open_dataset(group, name, kind="f", most=MOST_BYTES):
    """The dataset `name` of an open file or group.

    kind: 'f' floating-point numbers, 'u' or 'i' integers, 'text'. Raises ValueError if it is
    missing, in another file (a link, external or virtual), incomplete, or larger than `most`.
    """
    key = name.encode()
    inside = key in group.id and group.id.links.get_info(key).type == h5py.h5l.TYPE_HARD
    return check_dataset(group[name] if inside else None, name, kind, most)


def check_dataset(dataset, name, kind="f", most=MOST_BYTES):
    """Check a dataset as `open_dataset` describes, and return it."""
    created = dataset.id.get_create_plist() if isinstance(dataset, h5py.Dataset) else None
    layout = created.get_layout() if created else h5py.h5d.VIRTUAL
    if layout == h5py.h5d.VIRTUAL or created.get_external_count():
        raise ValueError(f"{name} is not a dataset in this file")
    dtype, shape = dataset.dtype, dataset.shape
    is_text = h5py.check_string_dtype(dtype) is not None
    if shape is None or is_text != (kind == "text"):
        raise ValueError(f"{name} is not {'text' if kind == 'text' else 'numbers'}")
    if not is_text and (dtype.kind != kind or dtype.itemsize > 8):
        raise ValueError(f"{name} has type {dtype}, not {kind}")
    size = math.prod(shape) * dtype.itemsize
    if size > most:
        raise ValueError(f"{name} has {size / 1e9:.3g} GB; at most {most / 1e9:.3g} are read")
    if layout == h5py.h5d.CHUNKED:
        whole = dataset.id.get_num_chunks() == expected_chunks(dataset, created, name, most)
    else:
        whole = dataset.id.get_storage_size() >= size
    if not whole:
        raise ValueError(f"{name} is incomplete: parts of it were never written")
    return dataset


def expected_chunks(dataset, created, name, most):
    """The number of chunks of a complete dataset. Raises ValueError if there are too many."""
    filters = {created.get_filter(i)[0] for i in range(created.get_nfilters())}
    if filters - FILTERS:
        raise ValueError(f"{name} uses HDF5 filters that are not supported: {filters - FILTERS}")
    n = math.prod(-(-s // c) for s, c in zip(dataset.shape, dataset.chunks, strict=True))
    if n > MOST_CHUNKS or math.prod(dataset.chunks) * dataset.dtype.itemsize > most:
        raise ValueError(f"{name} is stored in {n} chunks of {dataset.chunks}")
    return n


def read_texts(group, name, shape, longest=200):
    """A text dataset of the given shape (None: any length), as an object array of str.

    Each text is cut to `longest` printable characters. Raises ValueError.
    """
    dataset = open_dataset(group, name, "text")
    fits = [s in (None, n) for s, n in zip(shape, dataset.shape, strict=False)]
    if len(shape) != dataset.ndim or not all(fits):
        raise ValueError(f"{name} has shape {dataset.shape}, expected {shape}")
    texts = np.empty(dataset.size, object)
    for i, raw in enumerate(np.asarray(dataset[()]).ravel()):
        raw = raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else str(raw)
        texts[i] = clean_text(raw, longest)
    return texts.reshape(dataset.shape)


def read_attributes(node, names, ndim=0):
    """The attributes among `names` that exist: a dict of name to text or number; with ndim=1 to a
    list of integers. Raises ValueError if an attribute has another type or is too large.
    """
    values = {}
    for name in names:
        if not h5py.h5a.exists(node.id, name.encode()):
            continue
        attribute = h5py.h5a.open(node.id, name.encode())
        dtype = attribute.dtype
        is_text = h5py.check_string_dtype(dtype) is not None
        fits = dtype.kind in "iu" if ndim else is_text or dtype.kind in "iufb"
        one = not ndim and attribute.shape == (1,)  # MATLAB and C programs write scalars like this
        if not fits or attribute.shape is None or (len(attribute.shape) != ndim and not one):
            raise ValueError(f"attribute {name} has type {dtype} and shape {attribute.shape}")
        if attribute.get_storage_size() > MOST_ATTRIBUTE:
            raise ValueError(f"attribute {name} is too large")
        value = node.attrs[name][0] if one else node.attrs[name]
        if is_text:
            values[name] = clean_text(value.decode() if isinstance(value, bytes) else value)
        else:
            values[name] = value.tolist()
    return values


def find_datasets(f, name):
    """Paths (bytes) of all datasets called `name` in an open file, sorted.

    Enters each group only once. Raises ValueError if the file contains a link.
    """
    paths, waiting, entered = [], [(f.id, b"")], set()
    while waiting:
        group, path = waiting.pop()
        for key in group:
            if group.links.get_info(key).type != h5py.h5l.TYPE_HARD:
                raise ValueError("it contains links, which are not supported")
            node = h5py.h5o.open(group, key)
            if isinstance(node, h5py.h5g.GroupID):
                address = h5py.h5o.get_info(node).addr
                if address not in entered:
                    entered.add(address)
                    waiting.append((node, path + b"/" + key))
            elif isinstance(node, h5py.h5d.DatasetID) and key == name.encode():
                paths.append(path + b"/" + key)
    return sorted(paths)


def shortest_distinct(paths):
    """The shortest ends of the paths that are all different: list of str."""
    parts = [path.decode("utf-8", "backslashreplace").strip("/").split("/") for path in paths]
    keep, most = 1, max(map(len, parts), default=1)
    while keep < most and len({tuple(p[-keep:]) for p in parts}) < len(parts):
        keep += 1
    return [clean_text("/".join(p[-keep:])) for p in parts]
