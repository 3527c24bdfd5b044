"""Areas hdf5, packs and journals: what `predict` reads, damaged or made to do harm."""

import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from tests.faults.mutations import ESCAPE, KINDS, NAMES, TEXTS, damaged, nested, odd_value
from tests.faults.worker import Case, one_line, run

VICTIM = "s1"
TEXT = h5py.string_dtype()


def clips(seed, V=2, C=2):
    return np.random.default_rng(seed).standard_normal((V, C, 768)).astype(np.float32)


def make_cohort(home, n=24):
    """Config, labels and embeddings (our layout) of a small cohort, in a folder."""
    from echofocus_core.video import store

    rows, folder = [], home / "emb"
    folder.mkdir(parents=True)
    for i in range(n):
        starts = np.arange(2)
        videos = {f"v{v}.avi": (starts, clips(100 * i + v)[:1]) for v in range(1 + i % 3)}
        files = dict.fromkeys(videos, store.FileRecord())
        store.write_study(folder / f"s{i}.hdf5", videos, {"weights_sha256": "ab" * 32}, files)
        rows.append({"pid": f"P{i}", "eid": f"s{i}", "finding": i % 2, "size": 3 + i / 7})
    pd.DataFrame(rows).to_csv(home / "labels.csv", index=False)
    recipe = {"encoder_depth": 0, "batch_number": 8, "epoch_lim": 1, "learning_rate": 1e-3}
    common = {"label_path": "labels.csv", "settings": recipe}
    tasks = {
        "defect": {"task_labels": ["finding"], **common},
        "sizes": {"task_labels": ["size"], "units": {"size": "cm"}, **common},
    }
    config = {"task": tasks, "dataset": {"site": {"embedding_path": "emb"}}}
    (home / "config.json").write_text(json.dumps(config))


@cache
def home():
    """A cohort and its two models, made once for all workers of a campaign."""
    folder = Path(os.environ["FAULTS_BASE"], "cohort")
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        make_cohort(folder)
        here = os.getcwd()
        os.chdir(folder)
        for line in (["train", "--task", "defect"], ["train", "--task", "sizes"], ["pack"]):
            result = run(*line)
            assert result.status == 0, result
        os.rename("emb.packed.h5", "whole.packed.h5")
        assert run("predict", "--model_name", "defect", "--out", "whole.csv").status == 0
        (folder / "done").touch()
        os.chdir(here)
    return folder


def base(area):
    return home()


def small_cohort(here, base, n=5):
    """A copy of the first studies; the model is linked, since nothing is to be written there."""
    (here / "emb").mkdir()
    for i in range(n):
        shutil.copy2(base / "emb" / f"s{i}.hdf5", here / "emb")
    for name in ("config.json", "labels.csv"):
        shutil.copy(base / name, here)
    os.symlink(base / "trained_models", here / "trained_models")


def predicted(path):
    return pd.read_csv(path, dtype={"eid": str}, keep_default_na=False).set_index("eid")


def compare(base, complaint="", victims=(VICTIM,), silent=True):
    """What is wrong with p.csv against the whole table; a victim may be left out, or warned of.

    silent: a victim's other number is wrong, since the file says what it should be.
    """
    if complaint:
        return complaint
    found, whole = predicted("p.csv"), predicted(base / "whole.csv")

    def differs(eid):
        return abs(float(found.loc[eid, "finding"]) - float(whole.loc[eid, "finding"])) > 2e-5

    for eid in {"s0", "s2", "s3", "s4"} - set(victims):
        if eid not in found.index:
            return f"healthy study {eid} is missing"
        if differs(eid):
            return f"healthy study {eid} has another number"
    for eid in victims if silent else ():
        if eid in found.index and not found.loc[eid, "warning"] and differs(eid):
            return f"WRONG IN SILENCE: {eid} {found.loc[eid, 'finding']}"
    return ""


def predict_line():
    return ["predict", "--model_name", "defect", "--out", "p.csv"]


# ------------------------------------------------------------------------------------------- hdf5


def external(f, rng):
    del f["embeddings"]
    place = [("/etc/passwd", 0, 1 * 2 * 768 * 4)]
    f.create_dataset("embeddings", (1, 2, 768), np.float32, external=place)


def virtual(f, rng):
    layout = h5py.VirtualLayout((1, 2, 768), np.float32)
    layout[:] = h5py.VirtualSource("../emb/s0.hdf5", "embeddings", (1, 2, 768))
    del f["embeddings"]
    f.create_virtual_dataset("embeddings", layout)


def external_link(f, rng):
    name = str(rng.choice(["embeddings", "videos"]))
    del f[name]
    f[name] = h5py.ExternalLink("s0.hdf5", name)


def soft_loop(f, rng):
    f["loop"], f["a/b"] = h5py.SoftLink("/loop"), h5py.SoftLink("/a")
    del f["embeddings"]
    f["embeddings"] = h5py.SoftLink("/a/b")


def external_names(f, rng):
    del f["videos"]
    f.create_dataset("videos", (2,), "S100", external=[("/etc/passwd", 0, 200)])


def huge_claim(f, rng):
    del f["embeddings"]
    shape = [(10**6, 2, 768), (2, 10**9, 768), (2**40, 2**10, 768)][int(rng.integers(3))]
    f.create_dataset("embeddings", shape, np.float32, chunks=(1, 1, 768))


def bomb(f, rng):
    del f["embeddings"]
    f.create_dataset(
        "embeddings", (40_000, 4, 768), np.float32, chunks=(4000, 4, 768), compression="gzip",
        fillvalue=0,
    )[:4000] = 0  # fmt: skip


def other_type(f, rng):
    name = str(rng.choice(["embeddings", "videos", "clip_starts", "files", "skipped"]))
    if name in f:
        del f[name]
    values = [
        "text", np.array([b"x" * 10] * 3), np.zeros((2, 2), complex), np.float64(1), np.int64(5),
        np.zeros((2, 2, 768), np.int32), np.zeros((0, 2, 768), np.float32), h5py.Empty("f"),
        np.zeros((2, 2), [("a", "f4"), ("b", "i8")]), np.full((1, 2, 768), np.nan, np.float32),
        np.full((1, 2, 768), 3e38, np.float64), np.zeros((1, 2, 767), np.float32),
        np.full((1, 2, 768), 1e30, np.float32), np.zeros((1, 2, 768), np.float32),
        np.zeros((1, 768), np.float32), np.array([True, False]),
    ]  # fmt: skip
    f[name] = values[int(rng.integers(len(values)))]


def reference(f, rng):
    del f["videos"]
    f.create_dataset("videos", (1,), h5py.ref_dtype)[0] = f["embeddings"].ref
    f.attrs["size"] = f["embeddings"].ref


def odd_attribute(f, rng):
    names = ["weights_sha256", "size", "sampling", "crc32", "records_crc32", "mask", "clip_len"]
    name = str(rng.choice(names))
    values = [
        "x" * 60_000, np.zeros((30, 30)), h5py.Empty("f"), np.array(["a", "b"], object), ESCAPE,
        np.zeros(1, [("a", "f4")]), np.complex64(1), -1, float("nan"), np.bool_(True), "a\nb",
        np.bytes_(b"\xff\xfe"), np.uint32([1, 2, 3]), f["embeddings"].ref, [0.5],
        [224, 112],
    ]  # fmt: skip
    value = values[int(rng.integers(len(values)))]
    if isinstance(value, np.ndarray) and value.dtype == object:
        f.attrs.create(name, list(value), dtype=TEXT)
    else:
        f.attrs[name] = value


def odd_names(f, rng):
    del f["videos"]
    text = [t for t in TEXTS if "\0" not in t and t.isprintable() | (len(t) < 300)]
    name = (
        text[int(rng.integers(len(text)))].encode(errors="surrogatepass").decode(errors="replace")
    )
    f.create_dataset("videos", data=[name] * len(f["embeddings"]), dtype=TEXT)


def deep(f, rng):
    node = f
    del f["embeddings"]
    for _ in range(int(rng.choice([50, 1000]))):
        node = node.create_group("g")
    node["emb"] = clips(1)[0]


def circle(f, rng):
    del f["embeddings"]
    f.create_group("a")["b"] = f["/"]
    f["a/c/emb"] = clips(1)[0]


INSIDE = [external, virtual, external_link, soft_loop, external_names, huge_claim, bomb, other_type,
          other_type, reference, odd_attribute, odd_attribute, odd_names, deep, circle]  # fmt: skip


def published(path):
    with h5py.File(path, "w") as f:
        for v, array in enumerate(clips(100)[:1]):
            f[f"lab/site/s1_trim/v{v}.avi/emb"] = array


def shards(folder, rng):
    """The studies as the published cache has them, its index or a shard damaged; the fault."""
    studies = sorted(folder.glob("s*.hdf5"))
    with h5py.File(folder / "shard_00000.h5", "w") as f:
        for path in studies:
            with h5py.File(path) as own:
                f[f"{path.stem}/emb"] = own["embeddings"][:].astype(np.float16)
    for path in studies:
        path.unlink()
    index = {"num_shards": 1, "eids": [p.stem for p in studies], "dtype": "float16", "clip_len": 16}
    draw = rng.random()
    if draw > 0.9:
        kind = KINDS[int(rng.integers(len(KINDS)))]
        kind(folder / "cache_index.json")
        return f"shards: index a {kind.__name__}"
    if draw > 0.8:
        index[str(rng.choice(list(index)))] = odd_value(rng)
    text, fault = json.dumps(index, default=repr, skipkeys=True), "value"
    if draw < 0.3:
        text = text.replace(
            str(rng.choice(["1", '"s1"', "16", '"float16"', "["])), "[" * 100_000, 1
        )
        fault = "nested index"
    elif draw < 0.6:
        fault, data = damaged(text.encode(), rng)
        text = data.decode("latin-1")
    elif draw < 0.8:
        shard = folder / "shard_00000.h5"
        fault, data = damaged(shard.read_bytes(), rng)
        shard.write_bytes(data)
    (folder / "cache_index.json").write_bytes(text.encode("latin-1", "replace"))
    return f"shards: {fault}"


def hdf5(rng, here, base):
    """One study's file among five, or a cache of shards."""
    small_cohort(here, base)
    path, draw, silent = here / "emb" / f"{VICTIM}.hdf5", rng.random(), True
    if draw < 0.35:
        fault, data = damaged(path.read_bytes(), rng)
        path.write_bytes(data)
    elif draw < 0.75:
        change = INSIDE[int(rng.integers(len(INSIDE)))]
        fault, silent = change.__name__, change not in (odd_names, deep, circle, other_type)
        with h5py.File(path, "r+") as f:
            change(f, rng)
    elif draw < 0.82:
        path.unlink()
        kind = KINDS[int(rng.integers(len(KINDS)))]
        fault = kind.__name__
        kind(path)
    elif draw < 0.88:
        fault = "name"
        odd = NAMES[int(rng.integers(len(NAMES)))]
        path.rename(path.with_name(f"{odd}.hdf5"))
        result = run(*predict_line())
        return Case(fault, one_line(result) or compare(base, victims=(), silent=False))
    elif draw < 0.94:
        published(path)
        fault, data = damaged(path.read_bytes(), rng)
        path.write_bytes(data)
        fault, silent = f"published: {fault}", False
    else:
        fault = shards(here / "emb", rng)
        result = run(*predict_line())
        return Case(fault, one_line(result, "emb", "shard", "cache_index"))
    result = run(*predict_line())
    complaint = one_line(result)
    if not complaint and result.status:
        complaint = f"the run ended: {result.err[-300:]}"
    if not complaint and "root:" in result.said + Path("p.csv").read_text():
        complaint = "a file of the machine is in the output"
    return Case(fault, compare(base, complaint, silent=silent))


# ------------------------------------------------------------------------------------------ packs


def odd_index(path, rng):
    """A column of the index with other numbers, and the digest of that: made to do harm."""
    from echofocus_core.video import store

    with h5py.File(path, "r+") as f:
        name = str(rng.choice([*store.COLUMNS, "settings"]))
        where = f if name == "settings" else f["index"]
        values = where[name][:]
        row = int(rng.integers(len(values)))
        if values.dtype.kind == "O":
            text = [t for t in TEXTS if "\0" not in t and t != "\ud800"]
            values[row] = text[int(rng.integers(len(text)))]
            if name == "settings" and rng.random() < 0.5:
                values[row] = json.dumps(nested(60))
        else:
            least, most = np.iinfo(values.dtype).min, np.iinfo(values.dtype).max
            values[row] = rng.choice([0, 1, 7, 10**6, least, most])
        where[name][:] = values
        index = {n: f["index"][n][:] for n in store.COLUMNS}
        for n, x in index.items():
            if x.dtype == object:
                index[n] = np.array([t.decode(errors="replace") for t in x], object)
        settings = [t.decode() for t in f["settings"][:]]
        digest = store.index_digest(index, settings, f["embeddings"], f["videos"])
        f.attrs["index_sha256"] = digest
    return f"index: {name}"


def packs(rng, here, base):
    """A damaged pack is said and not used, or refused; whatever it says, no other number."""
    small_cohort(here, base, 24)
    path, alone = here / "emb.packed.h5", rng.random() < 0.5
    shutil.copy(base / "whole.packed.h5", path)
    meant, silent = rng.random() < 0.4, True
    if meant:
        fault, silent = odd_index(path, rng), False
    else:
        fault, data = damaged(path.read_bytes(), rng)
        path.write_bytes(data)
    if alone:
        shutil.rmtree(here / "emb")
    result = run(*predict_line())
    complaint = one_line(result, "packed.h5", "emb")
    if complaint or (alone and result.status) or meant:
        return Case(fault, complaint)
    every = tuple(f"s{i}" for i in range(24))
    return Case(fault, compare(base, complaint, every, silent))


# --------------------------------------------------------------------------------------- journals

LINES = {
    "a line lost": lambda lines, i: lines.pop(i),
    "a line twice": lambda lines, i: lines.insert(i, lines[i]),
    "lines swapped": lambda lines, i: lines.insert(0, lines.pop(i)),
    "nested": lambda lines, i: lines.insert(i, b"[" * 100_000 + b"\n"),
    "a long line": lambda lines, i: lines.insert(i, b"1" * 10**6 + b"\n"),
}


@cache
def whole_journal():
    """The bytes of a journal of `predict` that was stopped before its end."""
    import echofocus
    from echofocus_core.base.files import Journal

    here = os.getcwd()
    os.chdir(tempfile.mkdtemp(dir=os.environ["FAULTS_BASE"]))
    small_cohort(Path.cwd(), home(), 24)
    delete, Journal.delete = Journal.delete, lambda self: None
    window, echofocus.WINDOW = echofocus.WINDOW, 6
    try:
        assert run(*predict_line()).status == 0
    finally:
        Journal.delete, echofocus.WINDOW = delete, window
    data = Path(".p.csv.journal").read_bytes()
    os.chdir(here)
    return data


def journals(rng, here, base):
    """Whatever a journal says, the table is that of a run never stopped."""
    import echofocus

    data = whole_journal()
    small_cohort(here, base, 24)
    path = here / ".p.csv.journal"
    if rng.random() < 0.5:
        lines = data.splitlines(keepends=True)
        fault = str(rng.choice(list(LINES)))
        LINES[fault](lines, int(rng.integers(len(lines))))
        data = b"".join(lines)
    else:
        fault, data = damaged(data, rng)
    path.write_bytes(data)
    echofocus.WINDOW, window = 6, echofocus.WINDOW
    result = run(*predict_line())
    echofocus.WINDOW = window
    complaint = one_line(result) or (result.status and result.err[-300:])
    left = [p.name for p in here.iterdir() if "journal" in p.name or "lock" in p.name]
    if not complaint and left:
        complaint = f"left behind: {left}"
    every = tuple(f"s{i}" for i in range(24))
    return Case(fault, compare(base, complaint or "", every))
