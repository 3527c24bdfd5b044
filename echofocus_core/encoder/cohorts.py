"""Labelled videos for the encoder's training, in their published folder layouts.

    echonetdynamic     FileList.csv (FileName, EF, ESV, EDV, Split), Videos/<FileName>.avi
    echonetpediatric   A4C/ and PSAX/, each Videos/ and FileList.csv (FileName
                       <patient>-<accession>-<n>.avi, EF, Split 0 to 9)
    hospital           train.csv, val.csv, test.csv: fname, video_dir, acc_num, one column per
                       task; a column `patient` if a patient has several accessions

Used by training and `check`; findings go to a listener (base/console.py).
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from echofocus_core.base.console import RUN, UserError, count_of, nearest, printable, some
from echofocus_core.base.files import sha256_of
from echofocus_core.base.hdf5 import shortest_distinct
from echofocus_core.base.options import FOLDS
from echofocus_core.base.tables import MISSING, clean_ids, read_table, to_numbers
from echofocus_core.study.folds import report_copies_in
from echofocus_core.study.kinds.multiclass import class_numbers
from echofocus_core.study.labels import one_form, warn_of_suspicious_values
from echofocus_core.video.panecho import TASKS
from echofocus_core.video.record import read_tasks

VIEWS = ("A4C", "PSAX")  # of EchoNet-Pediatric
PEDIATRIC_FOLDS = 10
UNNAMED = ["0.0", "1.0"]  # classes of a binary task whose table has 0 and 1, or no and yes
ECHONET = {  # volumes, which FileList.csv has in addition to EF
    name: {"name": name, "type": "regression", "class_names": [], "mean": 0.0, "unit": "mL"}
    for name in ("ESV", "EDV")
}


@dataclass
class VideoCohort:
    """The videos of a cohort, one row each.

    videos: index = the video's name in outputs; columns path, study, patient, split (train, val,
    test, or the number of a fold) and, after decoding, content (a checksum). labels: same index,
    one column per task, NaN if missing; classes are numbers from 0 in the order of `class_names`.
    """

    name: str
    tasks: list[dict]
    videos: pd.DataFrame
    labels: pd.DataFrame

    @property
    def by_metric(self):
        """Whether early stopping uses AUROC and R2, or else the validation loss."""
        return self.name == "hospital"

    def folds(self, k=0):
        """train, val or test for each video; of numbered folds, k is test and the next is val."""
        split = self.videos["split"]
        if self.name != "echonetpediatric":
            return split
        numbers = (split.astype(int) - k) % PEDIATRIC_FOLDS
        return numbers.map({0: "test", 1: "val"}).fillna("train")

    def digest(self):
        """SHA-256 of names, patients, folds and labels."""
        return sha256_of(self.videos[["study", "patient", "split"]].join(self.labels).to_csv())

    def content_digest(self):
        """SHA-256 of names and decoded frames; '' before they are decoded."""
        if "content" not in self.videos:
            return ""
        return sha256_of(self.videos[["content"]].sort_index().to_csv())

    def without(self, names):
        """The cohort without these videos."""
        kept = ~self.videos.index.isin(list(names))
        return replace(self, videos=self.videos[kept], labels=self.labels[kept])


def read_cohort(name, folder, tasks=(), listener=RUN):
    """The VideoCohort in a folder. Raises UserError.

    tasks: names of PanEcho's tasks (or EchoNet's volumes), or a JSON file with others, see
    `record.read_tasks`; by default EF for EchoNet, else every task that the tables have.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; give the folder of the cohort with --data_dir")
    available, names = named_tasks(name, list(tasks))
    words = {task: MISSING.intersection(t["class_names"]) for task, t in available.items()}
    cells, file = LAYOUTS[name](folder, listener, words)
    names = names or [task for task in available if task in cells]
    if not names:
        raise UserError(
            f"{file} has no column with the name of a PanEcho task; give others (--tasks)"
        )
    refuse_missing(cells, names, file)
    chosen = [dict(available[task]) for task in names]
    labels = {t["name"]: values_of(cells[t["name"]], t, name, file, listener) for t in chosen}
    again = cells[cells["path"].map(os.path.realpath).duplicated() | cells["name"].duplicated()]
    if len(again):
        raise UserError(
            f"{file}: {len(again)} videos are in two rows ({some(map(printable, again['name']))}); "
            "keep one row per video"
        )
    cells["patient"] = one_form(cells["patient"], file, listener)
    videos = cells[["path", "study", "patient", "split"]].set_axis(cells["name"])
    cohort = VideoCohort(name, chosen, videos, pd.DataFrame(labels).set_axis(cells["name"]))
    report_conflicts(cohort, file, listener)
    report_suspicious_values(cohort, file, listener)
    return usable_cohort(cohort, folder, listener)


# ------------------------------------------------------------------------------------- the layouts


def read_list(path, columns, listener, words):
    """Read a list of videos as text. UserError if one of `columns` is missing.

    words: see read_table.
    """
    cells = read_table(path, listener, "list of videos", words)
    refuse_missing(cells, columns, path)
    blank = cells[list(columns)].isna().any(axis=1)
    if blank.any():
        listener.warning(
            f"{path}: {count_of(blank.sum(), 'rows have')} no {' or '.join(columns)}: line "
            f"{some(cells.index[blank])}",
            "fill them in; these rows are left out",
        )
    return cells[~blank].copy()


def refuse_missing(cells, columns, path):
    for column in columns:
        if column not in cells:
            raise UserError(
                f"{path} has no column '{column}'{nearest(column, cells.columns)}; it has: "
                f"{some(map(printable, cells.columns), 12)}"
            )


def read_echonet(folder, splits, listener, words, view=""):
    """(rows with name, path, stem and split; path of FileList.csv) of a folder with Videos/."""
    path = folder / "FileList.csv"
    cells = read_list(path, ("FileName", "Split"), listener, words)
    cells["stem"] = cells["FileName"].str.removesuffix(".avi")
    cells["name"] = view + cells["stem"] + ".avi"
    cells["path"] = f"{folder / 'Videos'}{os.sep}" + cells["stem"] + ".avi"
    cells["split"] = cells["Split"].str.lower().str.removesuffix(".0")
    wrong = cells[~cells["split"].isin(list(splits))]
    if len(wrong):
        raise UserError(
            f"{path}, line {wrong.index[0]}: the Split {printable(wrong['Split'].iloc[0])[:30]} is "
            f"not one of {', '.join(splits)}"
        )
    return cells, path


def read_dynamic(folder, listener, words):
    """EchoNet-Dynamic: each video is a study and a patient."""
    cells, path = read_echonet(folder, FOLDS, listener, words)
    return cells.assign(study=cells["stem"], patient=cells["stem"]), path


def read_pediatric(folder, listener, words):
    """EchoNet-Pediatric: both views of an accession are a study."""
    views = [view for view in VIEWS if (folder / view).is_dir()]
    if not views:
        raise UserError(f"{folder} has no folder A4C or PSAX; --cohort echonetpediatric needs one")
    if len(views) == 1:
        listener.warning(f"{folder} has only {views[0]}", "the other view is not used")
    parts, splits = [], [str(k) for k in range(PEDIATRIC_FOLDS)]
    for view in views:
        cells, path = read_echonet(folder / view, splits, listener, words, f"{view}/")
        pieces = cells["stem"].str.split("-")
        odd = cells["stem"][pieces.str.len() != 3]
        if len(odd):
            raise UserError(
                f"{path}, line {odd.index[0]}: {printable(odd.iloc[0])[:60]} is not "
                "<patient>-<accession>-<number>.avi"
            )
        cells["patient"], cells["study"] = pieces.str[0], pieces.str[:2].str.join("-")
        parts.append(cells)
    return pd.concat(parts, ignore_index=True), path


def read_hospital(folder, listener, words):
    """One CSV per split; paths are relative to the folder, or absolute."""
    parts = []
    for split in FOLDS:
        path = folder / f"{split}.csv"
        if split == "test" and not path.is_file():
            listener.warning(f"{path} is missing", "there will be no test results")
            continue
        cells = read_list(path, ("fname", "video_dir", "acc_num"), listener, words)
        cells["study"] = clean_ids(cells["acc_num"], path, listener)
        if "patient" in cells:
            cells["patient"] = clean_ids(cells["patient"], path, listener)
            if blank := int(cells["patient"].isna().sum()):
                listener.warning(
                    f"{path}: {count_of(blank, 'rows have')} no patient",
                    "fill them in; an accession without a patient counts as one patient",
                )
        files = cells["fname"].map(lambda f: f if Path(f).suffix else f"{f}.avi")
        cells["path"] = [
            os.path.normpath(folder / d / f) for d, f in zip(cells["video_dir"], files, strict=True)
        ]
        cells["split"] = split
        parts.append(cells)
    with_patients = [cells["split"].iloc[0] for cells in parts if "patient" in cells and len(cells)]
    cells = pd.concat(parts, ignore_index=True)
    if 0 < len(with_patients) < cells["split"].nunique():
        listener.error(
            f"{folder}: only the tables of {' and '.join(with_patients)} have the column patient: "
            "a patient could be in two folds",
            "add it to all tables, or remove it if each accession is a different patient",
        )
    if not with_patients:
        cells["patient"] = None
    of_study = cells.groupby("study")["patient"].transform("first")
    cells["patient"] = cells["patient"].fillna(of_study).fillna(cells["study"])
    for study, paths in cells.groupby("study")["path"]:  # one name may be in two folders
        names = shortest_distinct([os.fsencode(path) for path in paths])
        cells.loc[paths.index, "name"] = [f"{study}/{name}" for name in names]
    return cells, folder / "train.csv"


LAYOUTS = {
    "hospital": read_hospital,
    "echonetdynamic": read_dynamic,
    "echonetpediatric": read_pediatric,
}


# ------------------------------------------------------------------------------------------ labels


def named_tasks(cohort, names):
    """(name -> entry of the tasks that tables may have, names of tasks to learn, [] for all)."""
    if len(names) == 1 and names[0].endswith(".json"):
        tasks = {t["name"]: t for t in read_tasks(names[0])}
        return tasks, list(tasks)
    is_echonet = cohort != "hospital"
    tasks = {t["name"]: t for t in TASKS} | (ECHONET if is_echonet else {})
    for task in names:
        if task not in tasks:
            raise UserError(
                f"--tasks: PanEcho has no task {printable(task)[:60]}{nearest(task, tasks)}; "
                "define other tasks in a JSON file: name, type, classes, unit"
            )
    return tasks, names or (["EF"] if is_echonet else [])


def values_of(column, task, cohort, file, listener):
    """A task's cells (text) as float64, NaN if missing; in hospital tables -1 is missing too.

    Classes: see `outputs.class_numbers`.
    """
    name, classes = task["name"], task["class_names"]
    missing = column.isna()
    if cohort == "hospital":
        missing |= pd.to_numeric(column, errors="coerce") == -1
    cells = column.mask(missing)
    if classes and classes != UNNAMED:
        values = class_numbers(name, cells, classes, file, listener)
    else:
        values = to_numbers(cells.to_frame(name), file, listener)[name]
        values = values.where(values.isin([0, 1])) if classes else values
    odd = values.isna() & ~missing
    if odd.any():
        expected = f"a class ({', '.join(classes)})" if classes else "a number"
        listener.warning(
            f"{file}, {name}: {odd.sum()} values are not {expected}: "
            f"{some(printable(c)[:30] for c in column[odd])}",
            "correct them; they count as missing",
        )
    return values


# ---------------------------------------------------------------------------------------- findings


def report_conflicts(cohort, file, listener):
    """Report patients in several folds, studies of several patients and labels that differ within
    a study. They are errors in hospital tables, warnings in published ones."""
    serious = listener.error if cohort.by_metric else listener.warning
    videos, studies = cohort.videos, cohort.videos["study"]
    checks = [
        (serious, videos.groupby("patient")["split"], "patients are in several folds",
         "results would be too good: put each patient in one fold"),
        (listener.error, videos.groupby("study")["patient"], "studies have several patients",
         "give the videos of a study one patient"),
    ]  # fmt: skip
    remedy = "give a study one label; its predictions are compared with its first label"
    for name, labels in cohort.labels.items():
        checks.append(
            (serious, labels.groupby(studies), f"studies have videos with different {name}", remedy)
        )
    for report, groups, text, remedy in checks:
        counts = groups.nunique()
        several = counts.index[counts > 1]
        if len(several):
            report(f"{file}: {len(several)} {text}: {some(map(printable, several))}", remedy)


def report_suspicious_values(cohort, file, listener):
    """Report codes for 'missing', percentages above 100, and folds with different units."""
    studies = cohort.videos["study"]
    for task in cohort.tasks:
        if task["type"] != "regression":
            continue
        name, y = task["name"], cohort.labels[task["name"]].dropna()
        by_study = y.groupby(studies[y.index]).first()
        warn_of_suspicious_values(name, by_study, task.get("unit", ""), file, listener)
        medians = y.groupby(cohort.videos["split"][y.index]).median()
        if len(medians) and medians.abs().max() >= 10 * medians.abs().min() > 0:
            listener.warning(
                f"{file}, {name}: the medians of the folds are very different: "
                + ", ".join(f"{fold} {median:.3g}" for fold, median in medians.items()),
                "use one unit in all folds; the values are not changed",
            )


def report_copies(cohort, copies, listener=RUN):
    """Report videos with the same pixels; an error in hospital tables if they have different
    patients or folds. copies: lists of names."""
    rows = [cohort.videos.loc[names] for names in copies]
    serious = listener.error if cohort.by_metric else listener.warning
    remedy = "keep one of each in the tables"
    report_copies_in(
        copies, [x["patient"].nunique() > 1 or x["split"].nunique() > 1 for x in rows],
        (serious, f"videos of {cohort.name} of different patients or folds have the same pixels",
         f"{remedy}: it may be in training and in the test"),
        (listener.warning, f"videos of {cohort.name} of one patient have the same pixels",
         f"{remedy}: it counts twice"),
    )  # fmt: skip


def usable_cohort(cohort, folder, listener):
    """The cohort without videos that have no label or no file; reports them."""
    unlabelled = cohort.labels.isna().all(axis=1)
    absent = pd.Series([not Path(p).is_file() for p in cohort.videos["path"]], unlabelled.index)
    for where, text, remedy in (
        (unlabelled, "have no label", "fill them in"),
        (absent, "do not exist", "copy the files to the paths in the tables"),
    ):
        names = some(printable(n) for n in where.index[where])
        if where.all() and len(where):
            listener.error(f"{folder}: all {len(where)} videos {text}: {names}", remedy)
        elif where.any():
            listener.warning(
                f"{folder}: {where.sum()} videos {text}: {names}", f"{remedy}; they are left out"
            )
    cohort = cohort.without(cohort.labels.index[unlabelled | absent])
    counts = cohort.videos["split"].value_counts().sort_index()
    listener.note(
        f"{cohort.name}: {len(cohort.videos)} videos of {cohort.videos['study'].nunique()} "
        f"studies, {cohort.videos['patient'].nunique()} patients ("
        + ", ".join(f"{split} {n}" for split, n in counts.items())
        + f"); {len(cohort.tasks)} tasks"
    )
    return cohort
