"""Area numbers: cohorts of odd size and values that no heart has."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd

from tests.faults.stores import clips, home, predict_line, predicted, small_cohort
from tests.faults.worker import Case, one_line, peak, run


def base(area):
    return home()


def cohort(here, base, n=24):
    small_cohort(here, base, n)
    (here / "trained_models").unlink()
    shutil.copytree(base / "trained_models" / "defect", here / "trained_models" / "defect")
    return pd.read_csv("labels.csv")


def edit(**task):
    config = json.loads(Path("config.json").read_text())
    config["task"]["defect"] |= task
    Path("config.json").write_text(json.dumps(config))


def write(eid, V, C=2):
    import h5py

    with h5py.File(f"emb/{eid}.hdf5", "w") as f:
        f["embeddings"] = np.concatenate([clips(v % 97, 1, C) for v in range(V)])
        f.create_dataset("videos", data=[f"v{v}" for v in range(V)], dtype=h5py.string_dtype())


def one_and_many_videos(rng, here, base):
    """A study of one clip beside one of 3,000 videos."""
    cohort(here, base, 5)
    write("one", 1, 1)
    write("many", 3000)
    result = run(*predict_line())
    complaint = one_line(result) or (result.status and result.err[-300:])
    if not complaint and not {"one", "many", "s0"} <= set(predicted("p.csv").index):
        complaint = "a study is missing"
    return complaint


def train(table, **task):
    """A training of odd labels ends in a model that predicts finite numbers, or in one line."""
    edit(**task)
    table.to_csv("labels.csv", index=False)
    result = run("train", "--task", "defect", "--model_name", "m")
    if (complaint := one_line(result)) or result.status:
        return complaint
    result = run("predict", "--model_name", "m", "--out", "p.csv")
    complaint = one_line(result) or (result.status and f"trained, not usable: {result.err[-300:]}")
    if not complaint:
        values = predicted("p.csv").drop(columns="warning").apply(pd.to_numeric, errors="coerce")
        complaint = "" if np.isfinite(values.fillna(0)).all(axis=None) else "infinite answers"
    return complaint


def all_missing(rng, here, base):
    return train(cohort(here, base).assign(finding=np.nan))


def one_patient(rng, here, base):
    return train(cohort(here, base).assign(pid="P"))


def huge_values(rng, here, base):
    size = float(rng.choice([1e308, 1e300, 1e160, 1e38, 1e12, 1e9, 1e-300, 5e-324]))
    table = cohort(here, base)
    table["finding"] = np.linspace(0.5, 1, len(table)) * size
    if rng.random() < 0.5:
        table["finding"] *= np.where(np.arange(len(table)) % 2, 1, -1)
    return train(table, boxcox=["finding"] if rng.random() < 0.5 else [])


def one_value_far_away(rng, here, base):
    table = cohort(here, base)
    table["finding"] = np.linspace(1, 2, len(table))
    table.loc[int(rng.integers(len(table))), "finding"] = float(rng.choice([1e308, -1e308, 1e20]))
    return train(table, boxcox=["finding"] if rng.random() < 0.5 else [])


def evaluated_within(seconds, model):
    """'', or what is wrong with evaluating a model: a complaint, or more processor time."""
    began = time.process_time()
    result = run("evaluate", "--model_name", model, "--subset", "all")
    took = time.process_time() - began
    if complaint := one_line(result) or (result.status and result.err[-300:]):
        return complaint
    return f"{took:.0f} s" if took > seconds else ""


def many_labels(rng, here, base):
    """A thousand labels: training, prediction and evaluation in time."""
    table = cohort(here, base)
    names = [f"l{i}" for i in range(int(rng.choice([200, 1000])))]
    more = pd.DataFrame(rng.integers(0, 2, (len(table), len(names))), columns=names)
    table = pd.concat([table[["pid", "eid"]], more], axis=1)
    if complaint := train(table, task_labels=names):
        return complaint
    return evaluated_within(45, "m")


def labels_like_units(rng, here, base):
    """`A` in % and a label `A [%]` would be one column."""
    table = cohort(here, base).rename(columns={"finding": "A"}).assign(**{"A [%]": 1.5})
    table["A [%]"] = np.linspace(1, 2, len(table))
    return train(table, task_labels=["A", "A [%]"], units={"A": "%"})


def many_rows(rng, here, base):
    """A label table of 50,000 rows is read in seconds."""
    table = cohort(here, base)
    n = 50_000
    more = pd.DataFrame({"pid": [f"Q{i}" for i in range(n)], "eid": [f"q{i}" for i in range(n)]})
    more["finding"], more["size"] = np.arange(n) % 2, np.linspace(2, 8, n)
    pd.concat([table, more]).to_csv("labels.csv", index=False)
    return evaluated_within(20, "defect")


def flat_memory(rng, here, base):
    """predict on 2,000 studies takes hardly more memory than on 1,200, several windows."""
    cohort(here, base, 1)
    write("s0", 2, 2)
    for i in range(1, 2000):
        Path(f"emb/s{i}.hdf5").hardlink_to("emb/s0.hdf5")
    run(*predict_line(), "--sample_limit", "1200")
    before = peak()
    result = run(*predict_line())
    more = peak() - before
    return (
        one_line(result) or (result.status and result.err[-300:]) or (more > 60 << 20 and f"{more}")
    )


FAULTS = [all_missing, one_patient, huge_values, one_value_far_away, labels_like_units,
          many_rows, one_and_many_videos, many_labels, flat_memory, huge_values,
          one_value_far_away]  # fmt: skip


def numbers(rng, here, base):
    fault = FAULTS[int(rng.integers(len(FAULTS)))]
    return Case(fault.__name__, fault(rng, here, base) or "")
