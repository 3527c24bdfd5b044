"""Labels in the files of other projects, as the cells of a label table.

X.npz                   `indices` (rows of the array of clips) and `labels`, with clip_index.npz
                        in its folder or the one above; the label is called X
a folder of lists       train.csv, val.csv, test.csv: '<path of a video> <label>' on each line;
                        the label is called like the folder. zscore_params.json: `target_mean`
                        and `target_std` of a measurement that the lists give in SDs
patient_split.json      patient -> train, val or test, or these -> patients
"""

import json
import re

import numpy as np
import pandas as pd

from echofocus_core.base.console import UserError, printable, some
from echofocus_core.study.config import SPLIT
from echofocus_core.video.other_files import index_next_to, load_array

MIMIC_PATH = r"p(?P<pid>\d{8})/s(?P<eid>\d+)/"  # files/p15/p15690862/s90001295/90001295_0001.mp4
FOLDS = ("train", "val", "test")


def read_other_labels(path, pattern=""):
    """(cells as text with pid and eid, whether SPLIT is among them) of a path, or None for a
    label table. Raises UserError."""
    if path.is_dir():
        return lists_of_videos(path, pattern or MIMIC_PATH)
    return labels_of_clips(path) if path.suffix.lower() == ".npz" else None


def labels_of_clips(path):
    """pid, eid and the label of each study, from the labels of its clips."""
    index = index_next_to(path)
    rows, labels = (load_array(path, key) for key in ("indices", "labels"))
    if rows.shape != labels.shape or rows.ndim != 1:
        raise UserError(f"{path}: indices {rows.shape} and labels {labels.shape} differ in shape")
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(index):
        raise UserError(f"{path}: indices are not rows of the {len(index)} clips")
    clips = index.loc[rows, ["pid", "eid"]].reset_index(drop=True)
    clips[path.stem] = [as_text(x) for x in labels.tolist()]
    return one_row_a_study(clips, path)


def lists_of_videos(folder, pattern):
    """pid, eid, the label and SPLIT of each study, from the lists of a folder."""
    files = {fold: folder / f"{fold}.csv" for fold in FOLDS if (folder / f"{fold}.csv").is_file()}
    if not files:
        raise UserError(f"{folder} has no train.csv, val.csv or test.csv")
    try:
        pattern = re.compile(pattern)
    except re.error as error:
        raise UserError(f"path_pattern {pattern}: {error}") from error
    if missing := {"pid", "eid"} - set(pattern.groupindex):
        raise UserError(f"path_pattern has no group (?P<{missing.pop()}>...)")
    rows = [
        row_of_line(line, fold, pattern, f"{file}, line {n}")
        for fold, file in files.items()
        for n, line in enumerate(read_lines(file), 1)
        if line.strip()
    ]
    videos = pd.DataFrame(rows, columns=["pid", "eid", folder.name, SPLIT])
    scores = folder / "zscore_params.json"
    if scores.is_file():
        try:
            scale = json.loads(scores.read_text())
            mean, sd = float(scale["target_mean"]), float(scale["target_std"])
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{scores} needs the numbers target_mean and target_std") from error
        values = pd.to_numeric(videos[folder.name], errors="coerce") * sd + mean
        texts = values.map(as_text)
        videos[folder.name] = texts.where(values.notna(), videos[folder.name])
    return one_row_a_study(videos, folder)


def read_lines(file):
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: save it as UTF-8") from error


def row_of_line(line, fold, pattern, where):
    path, _, label = line.strip().rpartition(" ")
    match = pattern.search(path)
    if not match:
        raise UserError(f"{where}: no patient and study in {printable(path)}; give path_pattern")
    return match["pid"], match["eid"], label, fold


def as_text(x):
    """A label as a cell: 1 and not 1.0; None where it is missing."""
    if isinstance(x, float):
        return None if np.isnan(x) else f"{x:.9g}"
    return str(x)


def one_row_a_study(rows, path):
    """Rows of clips or videos -> of studies. Raises UserError if those of a study differ."""
    table = rows.drop_duplicates()
    repeated = table["eid"][table["eid"].duplicated()].unique()
    if len(repeated):
        raise UserError(
            f"{path}: the videos of {len(repeated)} studies have different labels, patients or "
            f"folds ({some(repeated)}): a study-level label must be the same for all videos "
            "of the study"
        )
    return table.reset_index(drop=True)


def read_split(path):
    """{patient: fold} of a JSON file. Raises UserError, also for a patient in two folds."""
    try:
        pairs = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=list)
        if {key for key, _ in pairs} <= {"train", "val", "valid", "validation", "test"}:
            pairs = [(pid, fold) for fold, pids in pairs for pid in pids]
        pairs = {(str(pid).strip(), str(fold)) for pid, fold in pairs}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a JSON file of patients and folds: {error}") from error
    split = dict(pairs)
    if len(split) < len(pairs):
        several = [pid for pid in split if sum(x == pid for x, _ in pairs) > 1]
        raise UserError(f"{path}: {len(several)} patients are in two folds: {some(several)}")
    return split
