"""Videos with labels, as their publishers lay them out, for the encoder's training.

    echonetdynamic     FileList.csv (FileName, EF, ESV, EDV, Split), Videos/<FileName>.avi
    echonetpediatric   A4C/ and PSAX/, each Videos/ and FileList.csv (FileName
                       <patient>-<accession>-<n>.avi, EF, Split 0 to 9)
    hospital           train.csv, val.csv, test.csv: fname, video_dir, acc_num and a column a task;
                       a column `patient` where several accessions are one patient's

A run and `check` read them here; what is found is told to a listener (common/console.py).
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from echofocus_core.base.console import RUN, UserError, nearest, printable, some
from echofocus_core.base.hdf5 import shortest_distinct
from echofocus_core.base.options import FOLDS
from echofocus_core.base.tables import MISSING, clean_ids, read_table, to_numbers
from echofocus_core.study.labels import one_form, warn_of_suspicious_values
from echofocus_core.video.panecho import TASKS
from echofocus_core.video.record import read_tasks

VIEWS = ("A4C", "PSAX")  # of EchoNet-Pediatric
PEDIATRIC_FOLDS = 10
ECHONET = {  # volumes and EF are the columns that FileList.csv has
    "ESV": {"name": "ESV", "type": "regression", "class_names": [], "mean": 0.0, "unit": "mL"},
    "EDV": {"name": "EDV", "type": "regression", "class_names": [], "mean": 0.0, "unit": "mL"},
}


@dataclass
class VideoCohort:
    """The videos of a cohort, a row each.

    videos: index = the video's name in outputs; columns path, study, patient, split (train, val,
    test, or the number of a fold) and, once decoded, content (a checksum). labels: same index, a
    column a task, NaN where missing; classes are numbers from 0 in the order of `class_names`.
    """

    name: str
    tasks: list[dict]
    videos: pd.DataFrame
    labels: pd.DataFrame

    @property
    def by_metric(self):
        """Whether training is stopped by AUROC and R2; else by the validation loss."""
        return self.name == "hospital"

    def folds(self, k=0):
        """train, val or test of each video; of numbered folds k tests, the next one validates."""
        split = self.videos["split"]
        if self.name != "echonetpediatric":
            return split
        numbers = split.astype(int)
        val = (k + 1) % PEDIATRIC_FOLDS
        named = np.where(numbers == k, "test", np.where(numbers == val, "val", "train"))
        return pd.Series(named, self.videos.index)

    def digest(self):
        """SHA-256 of names, patients, folds and labels."""
        return sha256_of(self.videos[["study", "patient", "split"]].join(self.labels))

    def content_digest(self):
        """SHA-256 of names and decoded frames; '' before these are known."""
        return sha256_of(self.videos[["content"]].sort_index()) if "content" in self.videos else ""

    def without(self, names):
        """The cohort less some videos."""
        kept = ~self.videos.index.isin(list(names))
        return VideoCohort(self.name, self.tasks, self.videos[kept], self.labels[kept])


def sha256_of(table):
    return hashlib.sha256(table.to_csv().encode(errors="surrogatepass")).hexdigest()


def read_cohort(name, folder, tasks=(), listener=RUN):
    """The VideoCohort in a folder. Raises UserError.

    tasks: names of PanEcho's (EchoNet's volumes too), or one JSON file of one's own, see
    `record.read_tasks`; none: EF for EchoNet, else every task that the tables have.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; --data_dir names the folder of the cohort")
    read = {
        "hospital": read_hospital,
        "echonetdynamic": read_dynamic,
        "echonetpediatric": read_pediatric,
    }[name]
    known = known_tasks(name, list(tasks))
    words = {task: MISSING.intersection(t["class_names"]) for task, t in known.items()}
    cells, file = read(folder, listener, words)
    chosen = choose_tasks(name, list(tasks), known, cells, file)
    labels = pd.DataFrame(
        {t["name"]: values_of(cells[t["name"]], t, name, file, listener) for t in chosen}
    )
    refuse_twice(cells, file)
    cells["patient"] = one_form(cells["patient"], file, listener)
    tell_shared_studies(cells, file, listener)
    videos = cells[["path", "study", "patient", "split"]]
    cohort = VideoCohort(
        name, chosen, videos.set_axis(cells["name"]), labels.set_axis(cells["name"])
    )
    tell_overlaps(cohort, file, listener)
    tell_disagreements(cohort, file, listener)
    tell_suspicious(cohort, file, listener)
    return with_labels_and_files(cohort, folder, listener)


# ------------------------------------------------------------------------------------- the layouts


def read_list(path, columns, listener, words, what="list of videos"):
    """A table as text with at least these columns. UserError names those that are missing.

    words: see read_table.
    """
    cells = read_table(path, listener, what, words)
    for column in columns:
        if column not in cells:
            raise UserError(
                f"{path} has no column '{column}'{nearest(column, cells.columns)}; it has: "
                f"{some(map(printable, cells.columns), 12)}"
            )
    blank = cells[list(columns)].isna().any(axis=1)
    if blank.any():
        listener.warning(
            f"{path}: {blank.sum()} rows lack {' or '.join(columns)}: line "
            f"{some(cells.index[blank])}",
            "fill in; they are left out",
        )
    return cells[~blank].copy()


def with_suffix(name):
    """A video's file as EchoNet's lists name it, with or without .avi."""
    return name if name.lower().endswith(".avi") else f"{name}.avi"


def read_dynamic(folder, listener, words):
    """EchoNet-Dynamic: each video is a study and a patient of its own, as nothing else is told."""
    path = folder / "FileList.csv"
    cells = read_list(path, ("FileName", "Split"), listener, words)
    cells["name"] = cells["FileName"].map(with_suffix)
    cells["path"] = [below(folder / "Videos", name, path) for name in cells["name"]]
    cells["study"] = cells["patient"] = cells["name"].str.removesuffix(".avi")
    cells["split"] = cells["Split"].str.lower()
    refuse_odd_splits(cells, FOLDS, path)
    return cells, path


def read_pediatric(folder, listener, words):
    """EchoNet-Pediatric: both views of an accession are a study."""
    views = [view for view in VIEWS if (folder / view).is_dir()]
    if not views:
        raise UserError(
            f"{folder} has neither A4C nor PSAX; it is not laid out as EchoNet-Pediatric"
        )
    if len(views) == 1:
        listener.warning(f"{folder} has {views[0]} alone", "the other view is left out")
    parts = []
    for view in views:
        path = folder / view / "FileList.csv"
        cells = read_list(path, ("FileName", "Split"), listener, words)
        names = cells["FileName"].map(with_suffix)
        pieces = names.str.removesuffix(".avi").str.split("-")
        odd = names[pieces.str.len() != 3]
        if len(odd):
            raise UserError(
                f"{path}, line {odd.index[0]}: {printable(odd.iloc[0])[:60]} is not "
                "<patient>-<accession>-<number>.avi"
            )
        cells["name"] = view + "/" + names
        cells["path"] = [below(folder / view / "Videos", name, path) for name in names]
        cells["patient"] = pieces.str[0]
        cells["study"] = pieces.str[0] + "-" + pieces.str[1]
        cells["split"] = cells["Split"].str.replace(r"\.0$", "", regex=True)
        refuse_odd_splits(cells, [str(k) for k in range(PEDIATRIC_FOLDS)], path)
        parts.append(cells)
    return pd.concat(parts, ignore_index=True), folder / views[0] / "FileList.csv"


def read_hospital(folder, listener, words):
    """One CSV a split; paths start at the folder, or are absolute."""
    parts = []
    for split in FOLDS:
        path = folder / f"{split}.csv"
        if split == "test" and not path.is_file():
            listener.warning(f"no {path}", "without it there are no results of a test")
            continue
        cells = read_list(path, ("fname", "video_dir", "acc_num"), listener, words)
        cells["study"] = clean_ids(cells["acc_num"], path, listener)
        if "patient" in cells:
            cells["patient"] = clean_ids(cells["patient"], path, listener)
            if blank := int(cells["patient"].isna().sum()):
                text = f"{path}: {blank} rows have no patient"
                listener.warning(text, "fill in; an accession without any is a patient of its own")
        files = cells["fname"].map(lambda f: f if Path(f).suffix else f"{f}.avi")
        cells["path"] = [
            os.path.normpath(folder / d / f) for d, f in zip(cells["video_dir"], files, strict=True)
        ]
        cells["split"] = split
        parts.append(cells)
    told = [cells["split"].iloc[0] for cells in parts if "patient" in cells and len(cells)]
    cells = pd.concat(parts, ignore_index=True)
    if 0 < len(told) < cells["split"].nunique():
        listener.error(
            f"{folder}: the column patient is in the tables of {' and '.join(told)} alone: "
            "a patient could be in two folds unseen",
            "add it to all tables, or to none where each accession is a patient of its own",
        )
    if told:
        of_study = cells.groupby("study")["patient"].transform("first")
        cells["patient"] = cells["patient"].fillna(of_study).fillna(cells["study"])
    else:
        cells["patient"] = cells["study"]
    for study, paths in cells.groupby("study")["path"]:  # one name may be in two folders
        names = shortest_distinct([os.fsencode(path) for path in paths])
        cells.loc[paths.index, "name"] = [f"{study}/{name}" for name in names]
    return cells, folder / "train.csv"


def below(folder, name, table):
    """The path of a file in a folder. UserError for a name that leads elsewhere."""
    if Path(name).name != name or "\0" in name:
        raise UserError(f"{table}: {printable(name)[:60]} is not a file's name")
    return str(folder / name)


def refuse_odd_splits(cells, allowed, path):
    odd = cells[~cells["split"].isin(list(allowed))]
    if len(odd):
        raise UserError(
            f"{path}, line {odd.index[0]}: the Split {printable(odd['split'].iloc[0])[:30]} is "
            f"none of {', '.join(allowed)}"
        )


def refuse_twice(cells, file):
    """UserError for a video, however its path is spelled, or a name that stands twice: its labels
    or folds might differ."""
    files = cells["path"].map(os.path.realpath)
    twice = cells[files.duplicated() | cells["name"].duplicated()]
    if len(twice):
        raise UserError(
            f"{file}: {len(twice)} videos stand twice, such as "
            f"{printable(Path(twice['path'].iloc[0]).name)}; keep one row a video"
        )


# ------------------------------------------------------------------------------------------ labels


def is_own_list(wanted):
    return len(wanted) == 1 and wanted[0].endswith(".json")


def known_tasks(name, wanted):
    """Name -> entry, like those of TASKS, of the tasks that a cohort's tables may have."""
    if is_own_list(wanted):
        return {t["name"]: t for t in read_tasks(wanted[0])}
    return {t["name"]: t for t in TASKS} | (ECHONET if name != "hospital" else {})


def choose_tasks(name, wanted, known, cells, file):
    """The entries of the tasks to learn; known: see `known_tasks`."""
    if is_own_list(wanted):
        wanted = list(known)
    if not wanted:
        wanted = [t for t in known if t in cells] if name == "hospital" else ["EF"]
    for task in wanted:
        if task not in known:
            raise UserError(
                f"--tasks: PanEcho has no task {printable(task)[:60]}{nearest(task, known)}; a "
                "task of your own comes from a JSON file: name, type, classes, unit"
            )
        if task not in cells:
            raise UserError(
                f"{file} has no column '{task}'{nearest(task, cells.columns)}; add it, or leave "
                "the task out"
            )
    if not wanted:
        raise UserError(
            f"{file} has no column of a task of PanEcho's; name those to learn with --tasks, or "
            "your own in a JSON file"
        )
    return [dict(known[task]) for task in wanted]


def values_of(column, task, cohort, file, listener):
    """A task's cells (text) as float64, NaN where missing; in hospital tables -1 is missing too.

    Classes are written by name or by number, from 0.
    """
    name, classes = task["name"], task["class_names"]
    names = {c.lower(): i for i, c in enumerate(classes) if not is_number(c)}
    named = column.str.lower().map(names).astype(float)
    others = column.mask(named.notna())
    if names:  # Yes and No are none of the names, and which of them they mean is not known
        others = others.where(others.str.contains(r"\d", na=False))
    missing = column.isna()
    if cohort == "hospital":
        missing |= pd.to_numeric(others, errors="coerce") == -1
    others = others.mask(missing)
    values = to_numbers(others.to_frame(name), file, listener)[name]
    if classes:
        values = class_numbers(values, task, file)
        values = values.where(values.isin(range(len(classes)))).fillna(named)
    odd = values.isna() & ~missing
    if odd.any():
        wanted = f"0 to {len(classes) - 1} or a class's name" if classes else "a number"
        listener.warning(
            f"{file}, {name}: {odd.sum()} values are not {wanted}: "
            f"{some(printable(c)[:30] for c in column[odd])}",
            "correct them; they count as missing",
        )
    return values


def is_number(text):
    return re.fullmatch(r"[-+]?\d+(\.\d*)?", text) is not None


def class_numbers(values, task, file):
    """Numbers in a task's column -> those of its classes, from 0.

    Where classes are called by numbers these are names, or numbers from 0: whichever all values
    are. UserError where they can be both, and mean different classes.
    """
    classes = task["class_names"]
    names = {float(c): i for i, c in enumerate(classes) if is_number(c)}
    found = set(values.dropna()) & {*names, *range(len(classes))}
    if all(names.get(value, value) == value for value in found):
        return values
    by_name, by_number = found <= set(names), found <= set(range(len(classes)))
    if by_name == by_number:
        raise UserError(
            f"{file}, {task['name']}: {some(f'{v:g}' for v in sorted(found))} can be names of its "
            f"classes ({', '.join(classes)}) or their numbers from 0; write the classes in words"
        )
    return values.map(names) if by_name else values


def tell_overlaps(cohort, file, listener):
    """Patients, or studies, that stand in several folds; an error in tables of one's own."""
    for what in ("study", "patient"):
        split = cohort.videos.groupby(what)["split"].nunique()
        both = split.index[split > 1]
        if len(both):
            tell = listener.error if cohort.by_metric else listener.warning
            word = "studies" if what == "study" else "patients"
            tell(
                f"{file}: {len(both)} {word} stand in several folds: {some(map(printable, both))}",
                "results on them would look better than they are: give each patient one fold",
            )
            return


def tell_shared_studies(cells, file, listener):
    """An error for studies that several patients have: the folds are by patient."""
    patients = cells.groupby("study")["patient"].nunique()
    both = patients.index[patients > 1]
    if len(both):
        listener.error(
            f"{file}: {len(both)} studies are of two patients: {some(map(printable, both))}",
            "give the videos of a study one patient",
        )


def tell_disagreements(cohort, file, listener):
    """Labels in which the videos of a study differ; an error in tables of one's own."""
    n = cohort.labels.groupby(cohort.videos["study"]).nunique()
    for label in n.columns[(n > 1).any()]:
        both = n.index[n[label] > 1]
        tell = listener.error if cohort.by_metric else listener.warning
        names = some(map(printable, both))
        tell(
            f"{file}, {label}: the videos of {len(both)} studies differ: {names}",
            "give a study one label; its results are compared with that of its first video",
        )


def tell_suspicious(cohort, file, listener):
    """Measurements that may mean something else than they say, in all folds or in one."""
    studies = cohort.videos["study"]
    for task in cohort.tasks:
        if task["type"] != "regression":
            continue
        name, y = task["name"], cohort.labels[task["name"]].dropna()
        by_study = y.groupby(studies[y.index]).first()
        warn_of_suspicious_values(name, by_study, task.get("unit", ""), file, listener)
        medians = y.groupby(cohort.videos["split"][y.index]).median()
        sizes = medians.abs()
        if len(sizes) and sizes.max() >= 10 * sizes.min() > 0:
            listener.warning(
                f"{file}, {name}: the medians of the folds are far apart: "
                + ", ".join(f"{fold} {median:.3g}" for fold, median in medians.items()),
                "give all folds in one unit; the values are taken as they are",
            )


def tell_copies(cohort, copies, listener=RUN):
    """Videos that are the same pixels; an error in tables of one's own if they are of different
    patients or folds. copies: lists of names."""
    apart = []
    for same in copies:
        alike = cohort.videos.loc[same]
        apart.append(alike["patient"].nunique() > 1 or alike["split"].nunique() > 1)
    for tell, wanted, whose, remedy in (
        (listener.error if cohort.by_metric else listener.warning, True,
         "of different patients or folds are", "it may be in training and in the test"),
        (listener.warning, False, "of one patient are", "it counts twice"),
    ):  # fmt: skip
        sets = [same for same, is_apart in zip(copies, apart, strict=True) if is_apart == wanted]
        if sets:
            pairs = some(" and ".join(map(printable, same[:3])) for same in sets)
            tell(
                f"{cohort.name}: {sum(map(len, sets))} videos {whose} the same pixels: {pairs}",
                f"keep one of each in the tables: {remedy}",
            )


def with_labels_and_files(cohort, folder, listener):
    """The cohort less videos without a label or a file, which are told."""
    unlabelled = cohort.labels.isna().all(axis=1)
    absent = pd.Series([not Path(p).is_file() for p in cohort.videos["path"]], unlabelled.index)
    for where, text, remedy in (
        (unlabelled, "have no label", "fill them in"),
        (absent, "are not there", "put the files where the tables say"),
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
