"""HDF5 files that others made: nothing from outside the file, nothing beyond a stated size.

Whatever is read of such a file is opened here. A file that does not keep to this raises one of
UNREADABLE, with the reason.
"""

import math
import os
from contextlib import contextmanager

import h5py
import numpy as np

from echofocus_core.base.console import clean_text
from echofocus_core.base.files import kept_errors

# What h5py raises on files that are damaged, or made to do harm, and what is raised here.
UNREADABLE = (OSError, KeyError, RuntimeError, TypeError, AttributeError, ValueError, MemoryError)

MOST_BYTES = 1 << 30  # numbers read at once: a study of 21,000 videos of 16 clips
MOST_TEXT = 64 << 20  # bytes of a dataset of text
MOST_CHUNKS = 100_000  # pieces of a dataset
MOST_OBJECTS = 500_000  # groups and datasets that are looked at in a file
MOST_DEPTH = 200  # groups within groups
MOST_ATTRIBUTE = 1 << 16  # bytes
PIECE = 16 << 20  # bytes looked through at once
LOOKED_THROUGH = set()  # files without a heap that has no end: device, number, size, time
FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
FILTERS |= {h5py.h5z.FILTER_LZF}  # any other would load a program from a plugin's folder


def open_hdf5(path):
    """The h5py.File, for reading. What is no regular file is not opened: a FIFO would block.

    No lock is asked for: some shared file systems have none, and our files are replaced whole.
    """
    if not path.is_file():
        raise OSError("no regular file")
    return h5py.File(path, "r", locking=False)


@contextmanager
def new_hdf5(path, mode="w"):
    """An h5py.File to write for the block. Raises OSError, with the system's reason.

    HDF5 that writes to a full disk by itself tells no reason, and may crash the interpreter at its
    end: it writes through Python, where the first error ends the block and HDF5 closes in memory.
    """
    how = "w+b" if mode == "w" else "r+b"
    with kept_errors(path, how, reads_back=True) as file, h5py.File(file, mode) as f:
        try:
            yield f
        finally:
            file.raises = False  # what is left to write is HDF5's own: it has to come to its end


def own_dataset(group, name, kind="f", most=MOST_BYTES):
    """The dataset `name` of an open file or group: it lies in the file, whole, and is of sane size.

    kind: 'f' floating-point numbers, 'u' or 'i' whole ones, 'text'. A link, an external or a
    virtual dataset would read another file. Raises ValueError.
    """
    key = name.encode()
    inside = key in group.id and group.id.links.get_info(key).type == h5py.h5l.TYPE_HARD
    return checked(group[name] if inside else None, name, kind, most)


def checked(dataset, name, kind="f", most=MOST_BYTES):
    """The dataset, when it is the file's own, of this kind and size, and all of it was written."""
    created = dataset.id.get_create_plist() if isinstance(dataset, h5py.Dataset) else None
    layout = created.get_layout() if created else h5py.h5d.VIRTUAL
    if layout == h5py.h5d.VIRTUAL or created.get_external_count():
        raise ValueError(f"{name} is no dataset of the file itself")
    dtype, shape = dataset.dtype, dataset.shape
    is_text = h5py.check_string_dtype(dtype) is not None
    if shape is None or is_text != (kind == "text"):
        raise ValueError(f"{name} is not {'text' if kind == 'text' else 'numbers'}")
    if not is_text and (dtype.kind != kind or dtype.itemsize > 8):
        raise ValueError(f"{name} is of {dtype}, not {kind}")
    size = math.prod(shape) * dtype.itemsize
    if size > most:
        raise ValueError(
            f"{name} claims {size / 1e9:.3g} GB, more than {most / 1e9:.3g} are not read"
        )
    if layout == h5py.h5d.CHUNKED:
        whole = dataset.id.get_num_chunks() == expected_chunks(dataset, created, name, most)
    else:
        whole = dataset.id.get_storage_size() >= size
    if not whole:
        raise ValueError(f"{name} is incomplete: parts of it were never written")
    return dataset


def expected_chunks(dataset, created, name, most):
    """How many pieces the dataset is stored in. Raises ValueError when they are out of bounds."""
    filters = {created.get_filter(i)[0] for i in range(created.get_nfilters())}
    if filters - FILTERS:
        raise ValueError(f"{name} is stored through a filter that is not read: {filters - FILTERS}")
    n = math.prod(-(-s // c) for s, c in zip(dataset.shape, dataset.chunks, strict=True))
    if n > MOST_CHUNKS or math.prod(dataset.chunks) * dataset.dtype.itemsize > most:
        raise ValueError(f"{name} is stored in {n} pieces of {dataset.chunks}")
    return n


def own_texts(group, name, shape, longest=200):
    """A dataset of text, of the given shape (None: any length), as an object array of str.

    Each is cut to `longest` printable characters. Raises ValueError.
    """
    return read_texts(own_dataset(group, name, "text", MOST_TEXT), name, shape, longest)


def read_texts(dataset, name, shape, longest=200):
    """`own_texts` of a dataset that `own_dataset` has opened."""
    fits = [s in (None, n) for s, n in zip(shape, dataset.shape, strict=False)]
    if len(shape) != dataset.ndim or not all(fits):
        raise ValueError(f"{name} is of shape {dataset.shape}, expected {shape}")
    if dataset.dtype.kind == "O":
        refuse_endless_heap(dataset.file)
        if text_bytes(dataset) > MOST_TEXT:
            raise ValueError(f"{name} holds texts of {text_bytes(dataset) / 1e6:.0f} MB")
    texts = np.empty(dataset.size, object)
    for i, raw in enumerate(np.asarray(dataset[()]).ravel()):
        raw = raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else str(raw)
        texts[i] = clean_text(raw, longest)
    return texts.reshape(dataset.shape)


def text_bytes(dataset):
    """How many bytes texts of varying length have, in sum, before they are read.

    Where they lie in one piece, an entry is 4 bytes of length and 12 of place; many entries may
    name one text, so that the file's own size is no bound. Elsewhere (in chunks) they are read a
    few at a time, since none is longer than the file, until they are too many.
    """
    at, n = dataset.id.get_offset(), dataset.size
    if at is None or dataset.id.get_storage_size() != 16 * n:
        longest = dataset.file.id.get_filesize() * math.prod(dataset.shape[1:])
        total, step = 0, max(1, MOST_TEXT // max(1, longest))
        for i in range(0, len(dataset), step):
            total += sum(map(len, dataset[i : i + step].ravel()))
            if total > MOST_TEXT:
                break
        return total
    raw = os.pread(dataset.file.id.get_vfd_handle(), 16 * n, at)
    return int(np.frombuffer(raw, "<u4")[::4].sum(dtype=np.uint64))


def refuse_endless_heap(f):
    """ValueError where HDF5 would never come back: from a heap with an object of no size.

    Texts of varying length lie in heaps ("HDF5 File Format Specification", III.E: 'GCOL', a
    version, a size; then objects of a number, where 0 is free space, and a size), which are looked
    for in the whole file, once a process; in a very large one not in its large plain datasets. A
    block of zeros in one is enough.
    """
    if f.driver == "fileobj":  # one of our own, being written
        return
    handle = f.id.get_vfd_handle()
    about = os.fstat(handle)
    key = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
    if key in LOOKED_THROUGH:
        return
    skipped, at, objects = plain_datasets(f) if about.st_size > MOST_BYTES else [], 0, 0
    for begin, end in [*skipped, (about.st_size,) * 2]:
        while at < begin:
            piece, found = os.pread(handle, min(PIECE, begin - at) + 3, at), -1
            while (found := piece.find(b"GCOL", found + 1)) >= 0:
                objects += objects_of_heap(handle, at + found)
                if objects > MOST_OBJECTS:
                    raise ValueError("its texts are damaged: a heap without end")
            at += PIECE
        at = max(begin, end)
    if len(LOOKED_THROUGH) > 10_000:
        LOOKED_THROUGH.clear()
    LOOKED_THROUGH.add(key)


def plain_datasets(f):
    """[(begin, end)] in bytes of large datasets of numbers that lie in one piece, in order."""
    sets = [f[k].id for k in f if isinstance(f.get(k, getlink=True), h5py.HardLink)
            and isinstance(f[k], h5py.Dataset) and f[k].dtype.kind == "f"]  # fmt: skip
    places = [(d.get_offset(), d.get_storage_size()) for d in sets]
    return sorted((at, at + size) for at, size in places if at is not None and size > PIECE)


def objects_of_heap(handle, at):
    """How many objects the heap at this place of a file has; inf where HDF5 would find no end."""
    start = os.pread(handle, 16, at)
    version, size = start[4:5], int.from_bytes(start[8:], "little")
    if version != b"\1":
        return 1
    if size > MOST_TEXT:
        return math.inf
    heap, i = os.pread(handle, size, at), 16
    n = 1 + (len(heap) >> 12)  # reading takes time, too
    while i + 16 <= len(heap) and n <= MOST_OBJECTS:
        number = int.from_bytes(heap[i : i + 2], "little")
        length = int.from_bytes(heap[i + 8 : i + 16], "little")
        step = 16 + -(-length // 8) * 8 if number else length
        if not step:
            return math.inf
        i, n = i + step, n + 1
    return n


WHAT = ["a text or number", "a list of whole numbers"]  # an attribute of 0 or 1 dimensions


def own_attributes(node, names, ndim=0):
    """The attributes of these names that are there: dict of name to text or number, which may
    be the one of a list; with ndim=1 to a list of whole numbers.

    Raises ValueError for any that is of another kind, a reference, a compound or too large.
    """
    found = {}
    for name in names:
        if not h5py.h5a.exists(node.id, name.encode()):
            continue
        attribute = h5py.h5a.open(node.id, name.encode())
        dtype = attribute.dtype
        is_text = h5py.check_string_dtype(dtype) is not None
        known = dtype.kind in "iu" if ndim else is_text or dtype.kind in "iufb"
        one = not ndim and attribute.shape == (1,)  # as MATLAB and programs in C write it
        if not known or attribute.shape is None or (len(attribute.shape) != ndim and not one):
            raise ValueError(f"attribute {name} is not {WHAT[ndim]}")
        if attribute.get_storage_size() > MOST_ATTRIBUTE:
            raise ValueError(f"attribute {name} is too large")
        if dtype.kind == "O":
            refuse_endless_heap(node.file)
        value = node.attrs[name][0] if one else node.attrs[name]
        if is_text:
            found[name] = clean_text(value.decode() if isinstance(value, bytes) else value)
        else:
            found[name] = value.tolist()
    return found


def find_datasets(f, wanted):
    """Paths (bytes) of all datasets called `wanted` below an open file's root, sorted.

    No link is followed, no group entered twice. Raises ValueError where there is a link or where
    groups have no end.
    """
    found, waiting, entered, n = [], [(f.id, b"", 0)], set(), 0
    while waiting:
        group, path, depth = waiting.pop()
        for name in group:
            n += 1
            if n > MOST_OBJECTS or depth > MOST_DEPTH:
                raise ValueError("groups within groups without end")
            if group.links.get_info(name).type != h5py.h5l.TYPE_HARD:
                raise ValueError("it holds links, which are not followed")
            node = h5py.h5o.open(group, name)
            if isinstance(node, h5py.h5g.GroupID):
                place = h5py.h5o.get_info(node).addr
                if place not in entered:
                    entered.add(place)
                    waiting.append((node, path + b"/" + name, depth + 1))
            elif isinstance(node, h5py.h5d.DatasetID) and name == wanted.encode():
                found.append(path + b"/" + name)
    return sorted(found)


def shortest_distinct(paths):
    """As many last parts of paths as it takes to tell them apart, one at least: list of str."""
    parts = [path.decode("utf-8", "backslashreplace").strip("/").split("/") for path in paths]
    keep, most = 1, max(map(len, parts), default=1)
    while keep < most and len({tuple(p[-keep:]) for p in parts}) < len(parts):
        keep += 1
    return [clean_text("/".join(p[-keep:])) for p in parts]
