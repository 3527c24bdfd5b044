"""`init`: a commented config for the embeddings, videos and tables of a folder."""

import json
import os
import re
import textwrap
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from echofocus_core.base import releases
from echofocus_core.base.console import EXTRACT, PROGRAM, RUN, Collected, UserError, count_of, some
from echofocus_core.base.tables import clean_ids, read_dates, read_table
from echofocus_core.study.config import CONFIGS, MODELS, Task, read_config
from echofocus_core.study.labels import LabelFile, decide_kinds, label_values, read_cells
from echofocus_core.study.sources import CLIP_EMBEDDINGS
from echofocus_core.video.dicom import read_header_facts
from echofocus_core.video.store import open_folder
from echofocus_core.video.studies import USUAL_WORD, is_candidate, is_hidden

OUTPUTS = {MODELS.name, CLIP_EMBEDDINGS.name, "frame_cache", "site-packages", "node_modules"}
CLONE = {"benchmarks", "demo", "docs", "tests"}  # folders of this repository
DEEPEST = 4  # folders below the config's
TABLES = {".csv", ".tsv", ".xlsx"}
# Names of columns, in lower case without other characters than letters and digits.
NUMBERS = ("id", "number", "no", "nr", "nummer")
STUDY = ("echo", "study", "exam", "examination", "untersuchungs", "studien")
STUDIES = ("eid", *(x + n for x in STUDY for n in NUMBERS), "accession", "accessionnumber",
           "study", "exam", "examination", "untersuchung", "filename")  # fmt: skip
PATIENTS = ("pid", *(x + n for x in ("patient", "patienten", "pat", "subject") for n in NUMBERS),
            "mrn", "subject", "patient")  # fmt: skip
PEOPLE = re.compile(  # columns whose cells may identify patients or staff
    r"(.*(name|phone|telefon|telephon|adress|address|strasse|street|physician|doctor|arzt|ärztin|"
    r"sonograph|operator|reader|untersucher|befunder|reporter|nurse|insurance|versicher|wohnort|"
    r"postcode|zipcode|comment|kommentar|bemerkung|remark|note)(in|s|r|er|en|e)?|e?mail(address)?|"
    r"tel|handy|mobile|fax|ort|city|plz|zip|initials|initialen|kürzel|staff|mta)"
    r"(nr|no|nummer|number)?\d*"
)
GROUPS = ("sex", "gender", "geschlecht", "age", "alter", "site", "hospital", "klinik", "fold",
          "split", "race", "ethnicity")  # fmt: skip
MANIFESTS = ({"study", "path"}, {"study_id", "dicom_filepath"}, {"FileName"})
TASK_NAMES = {"binary": "findings", "regression": "measurements", "multiclass": "grades"}
MOST_CLASSES = 9
UNIT = re.compile(  # at the end of a header: EF (%), LVEDD [mm]
    r"\s*[([]\s*((?:%|°|(?:[mcdµμnk]?(?:m|g|l|L|s|Hz|mol|Pa)|mmHg|min|bpm|h|d)[²³23]?)"
    r"(?:/(?:[mcdk]?(?:m|g|l|L|s)|min|h)[²³23]?)*|/min)\s*[)\]]$"
)
# Words of grades in their order. Other words are not copied into the config: they may be names.
GRADES = (
    "to bis and und grad grade stage class klasse nyha ccs",
    "no none normal absent negative negativ kein keine nein ohne unauffällig good gut 0",
    "trace trivial minimal spur i 1", "mild light leicht leichtgradig gering geringgradig low small"
    " ii 2", "moderate medium intermediate fair mittel mittelgradig mässig mäßig iii 3",
    "severe schwer schwergradig hochgradig high large poor schlecht iv 4", "critical massive v 5",
    "6", "7", "8", "9",
)  # fmt: skip
RANK = {word: rank for rank, words in enumerate(GRADES) for word in words.split()}
EXAMPLE = {"task_labels": ["finding"], "label_path": "labels.csv", "type": "binary"}
HEADER = """\
Lines that begin with // are comments. The program ignores them and never changes this file.
Paths are relative to this file. A task or a dataset may set options, as in "precision": "bf16"."""


@dataclass
class Files:
    """What a folder contains, as paths."""

    embeddings: list = field(default_factory=list)  # folders of clip embeddings
    videos: list = field(default_factory=list)  # folders of study folders
    tables: list = field(default_factory=list)
    manifest: Path | None = None  # a table that lists the videos of each study


def write_config(path=""):
    """Write the config for the folder that it is in; returns the line to type next.

    Raises UserError if the file exists.
    """
    path = Path(path or CONFIGS[0])
    if path.exists():
        raise UserError(
            f"{path} already exists and was not changed; edit it, or name another file "
            "with --config"
        )
    root = path.parent
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; create it, or name another file with --config")
    files = Files()
    search(root, files)
    datasets, ids = describe_datasets(root, files)
    tasks = {}
    files.manifest = next(filter(is_manifest, files.tables), None)
    for table in files.tables:
        prefix = f"{table.stem}_" if len(files.tables) > 1 else ""
        tasks |= propose_tasks(table, root, ids, prefix)
    line = next_line(root, files, datasets, tasks)
    if not tasks:
        text = "No label table was found. Name a table with a row per study and its columns here."
        tasks = {"example": (text, EXAMPLE)}
    if not datasets:
        text = "No clip embeddings were found. Name their folder here."
        datasets = {"example": (text, {"embedding_path": "embeddings"})}
    parts = [f'  "task": {{\n{entries(tasks)}\n  }}', f'  "dataset": {{\n{entries(datasets)}\n  }}']
    path.write_text(f"{{\n{comment(HEADER, 2)}\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    read_config(path)
    for name, (text, _) in [*tasks.items(), *datasets.items()]:
        print(f"{name}\n{textwrap.indent(text, '  ')}")
    print(f"wrote {path}: tasks {some(tasks, 9)}; datasets {some(datasets, 9)}")
    return line


def entries(parts):
    """{name: (comment, entry)} as JSON with comments, one line per key."""
    texts = []
    for name, (text, entry) in parts.items():
        keys = [f'      "{k}": {json.dumps(x, ensure_ascii=False)}' for k, x in entry.items()]
        body = ",\n".join(keys)
        name = json.dumps(name, ensure_ascii=False)
        texts.append(f"{comment(text, 4)}\n    {name}: {{\n{body}\n    }}")
    return ",\n".join(texts)


def comment(text, indent):
    start = " " * indent + "// "
    lines = [textwrap.wrap(line, 96 - indent, break_long_words=False) for line in text.split("\n")]
    return "\n".join(start + line for wrapped in lines for line in wrapped)


# ------------------------------------------------------------------------------------------- files


def search(folder, files, depth=0):
    """Add what a folder contains to `files`."""
    skipped = OUTPUTS | (CLONE if (folder / "echofocus.py").is_file() else set())
    below = sorted(p for p in folder.iterdir() if not is_hidden(p.name) and p.name not in skipped)
    files.tables += [p for p in below if p.suffix.lower() in TABLES and p.is_file()]
    if is_embedded(folder):
        files.embeddings.append(folder)
        return
    for sub in (p for p in below if p.is_dir() and not (p / "pyvenv.cfg").is_file()):
        mixed = any(is_embedded(p) for p in (sub, *sub.glob("*/"))) or any(
            p.suffix.lower() in TABLES for p in sub.iterdir()
        )
        video = None if mixed else first_video(sub)
        if video:
            base = folder if video.parent == sub else sub  # sub may be a study
            files.videos += [base] if base not in files.videos else []
        elif depth < DEEPEST:
            search(sub, files, depth + 1)


def is_embedded(folder):
    """Whether a folder holds clip embeddings of this program or of the published scripts."""
    paths = (*folder.glob("*.hdf5"), *folder.glob("cache_index.json"), *folder.glob("*.h5"))
    return any(not p.name.endswith(".packed.h5") for p in paths)


def first_video(folder):
    """The first file below a folder that may be a video, or None."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for path in (Path(parent, name) for name in sorted(names) if not is_hidden(name)):
            if path.is_file() and is_candidate(path):
                return path
    return None


def visible_folders(folder):
    return [p for p in sorted(folder.iterdir()) if p.is_dir() and not is_hidden(p.name)]


def study_folders(base):
    """(names of the folders of studies below `base`, whether these are in folders of patients).

    The folders in `base` are of patients if DICOM files in the first with several folders of videos
    are of several studies.
    """
    folders = visible_folders(base)
    for folder in folders:
        first = [video for sub in visible_folders(folder) if (video := first_video(sub))]
        if len(first) > 1:
            if len({read_header_facts(video).study_uid for video in first} - {""}) < 2:
                break
            return {sub.name for folder in folders for sub in visible_folders(folder)}, True
    return {folder.name for folder in folders}, False


def relative_path(path, root):
    """A path for the config in `root`; the folder itself by its name, which paths need."""
    text = Path(os.path.relpath(path, root)).as_posix()
    return f"../{root.resolve().name}" if text == "." else text


def describe_datasets(root, files):
    """({name: (comment, dataset)}, ids of all studies)."""
    datasets, ids, bases, keys, used = {}, set(), {}, {}, set()
    for base in files.videos:
        bases[base], nested = study_folders(base)
        ids |= {name.removesuffix("_trim") for name in bases[base]}
        keys[base] = {} if nested else {"video_base_path": relative_path(base, root)}
    for folder in files.embeddings:
        eids = set(open_folder(folder).files)
        entry, text = {"embedding_path": relative_path(folder, root)}, f"studies: {len(eids)}"
        for base, names in bases.items():
            for end in ("", "_trim"):
                with_videos = eids & {x.removesuffix(end) for x in names if x.endswith(end)}
                if with_videos:
                    used.add(base)
                    entry |= with_format(keys[base], end)
                    text += f", with videos in {relative_path(base, root)}: {len(with_videos)}"
        datasets[free_name(folder, root, datasets)] = text, entry
        ids |= eids
    for base in (b for b in files.videos if b not in used):
        name = free_name(base, root, datasets)
        text = f"folders of videos, not extracted yet: {len(bases[base])}"
        end = "_trim" if all(x.endswith("_trim") for x in bases[base]) else ""
        entry = {"embedding_path": f"embeddings/{name}"} | with_format(keys[base], end)
        datasets[name] = text, entry
    return datasets, ids


def with_format(keys, end):
    """A dataset's keys of its videos; none for videos in folders of patients."""
    return keys and keys | {"video_subdir_format": "{echo_id}" + end}


def free_name(folder, root, names):
    """A name for a dataset, from its folder."""
    name = re.sub(r"[^\w.+-]", "_", folder.resolve().name).lstrip(".+-")[:90] or "site"
    while name in names:
        name += "_2"
    return name


# ------------------------------------------------------------------------------------------ tables


def propose_tasks(path, root, ids, prefix):
    """{name: (comment, task)} of the columns of a table, one task per kind of label.

    ids: of the studies with embeddings or videos.
    """
    listener, tasks = Collected(), {}
    try:
        raw = read_table(path, listener)
        columns = id_columns(raw, path, ids)
        if "eid" not in columns:
            RUN.note(f"{path}: no column of study ids; not used")
            return {}
        rest = [x for x in raw if x not in columns.values()]
        units = {x: match[1] for x in rest if (match := UNIT.search(x))}
        headers = {UNIT.sub("", x) if x in units else x: x for x in rest}
        if len({*headers, *columns.values()}) < len(raw.columns):  # LVEDD [mm] and LVEDD [cm]
            headers = {x: x for x in rest}
        as_read = LabelFile(path, {"pid": columns["eid"]} | columns | headers)
        none = dict.fromkeys(raw, ("None",))  # a grade, see `kind_of_column`
        cells = read_cells(as_read, list(headers), listener, none)
        if cells is None:
            return {}
        labels, left_out = sort_columns(cells, list(headers), path)
        n = len(set(cells["eid"]) & ids)
        place = f"{relative_path(path, root)}: {count_of(len(cells), 'rows')}"
        place += f", of studies in the datasets below: {n}"
        if "pid" not in columns:
            text = "no column of patients, without which no model is trained"
            RUN.warning(f"{path}: {text}", 'name it in the config: "columns": {"pid": "..."}')
            place += f'\n{text}: "columns": {{"pid": "..."}} names it'
        if left_out:
            reasons = {
                why: [x for x in left_out if left_out[x] == why] for why in left_out.values()
            }
            texts = (f"{', '.join(names)} ({why})" for why, names in reasons.items())
            place += "\nleft out: " + "; ".join(texts)
        for kind, name in TASK_NAMES.items():
            chosen = {x: more for x, (its, more, _) in labels.items() if its == kind}
            if not chosen:
                continue
            facts = [] if tasks else [place]  # once for each table
            facts += [f"{x}: {labels[x][2]}" for x in chosen]
            entry = {
                "task_labels": list(chosen),
                "label_path": relative_path(path, root),
                "type": kind,
            }
            renamed = columns | {x: headers[x] for x in chosen}
            renamed = {x: header for x, header in renamed.items() if x != header}
            with_unit = {x: units[headers[x]] for x in chosen if headers[x] in units}
            entry |= {"columns": renamed} if renamed else {}
            entry |= {"units": with_unit} if with_unit and kind == "regression" else {}
            entry |= {"classes": chosen} if kind == "multiclass" else {}
            tasks[prefix + name] = "\n".join(facts), entry
    except UserError as error:
        RUN.note(f"not used: {error}")
        return {}
    if not tasks:
        RUN.note(f"{path}: no labels in it; not used")
    return tasks


def is_manifest(path):
    """Whether a table lists the videos of studies, see --manifest."""
    with suppress(UserError):
        columns = set(read_table(path, Collected()))
        return any(names <= columns for names in MANIFESTS)
    return False


def id_columns(raw, path, ids):
    """{'pid' and 'eid', where they are: the column}. ids: of the studies that exist."""
    plain = {plain_header(name): name for name in raw}
    columns = {}
    for key, names in (("pid", PATIENTS), ("eid", STUDIES)):
        for name in (plain[x] for x in names if x in plain):
            if key == "pid" or raw[name].nunique() > len(raw) / 2:  # a trial has many rows
                columns.setdefault(key, name)
    shares = {x: clean_ids(raw[x].dropna(), path, Collected()).isin(ids).mean() for x in raw}
    best = max(shares, key=lambda name: (shares[name], name == columns.get("eid")))
    if shares[best] > 0.5:
        columns["eid"] = best
    if columns.get("pid") == columns.get("eid"):
        columns.pop("pid", None)
    return columns


def plain_header(name):
    return re.sub(r"\W|_", "", name.casefold())


def grade_ranks(value):
    """A key that sorts grades, the ranks of a cell's words and digits; None for other words."""
    words = re.findall(r"[^\W\d_]+|\d", value.casefold())
    if not words or any(len(x) > 1 and not (x in RANK or USUAL_WORD.fullmatch(x)) for x in words):
        return None
    return [RANK[x] for x in words if x in RANK]


def sort_columns(cells, names, path):
    """({label: (kind, classes or None, facts)}, {column: why it is left out}) of a table."""
    labels, left_out = {}, {}
    for name in names:
        text = cells[name].dropna()
        kind, classes, facts = "", None, ""
        if not len(text):
            facts = "empty"
        elif plain_header(name) in GROUPS:
            facts = "for --by or --split_column"
        elif PEOPLE.fullmatch(plain_header(name)):
            facts = "may identify a person"
        elif read_dates(text)[1]:
            facts = "dates"
        elif not may_be_label(name, labels):
            facts = "its name is that of another column in the tables of results"
        else:
            kind, classes, facts = kind_of_column(cells, name, path)
        if kind:
            labels[name] = kind, classes, facts
        else:
            left_out[name] = facts
    return labels, left_out


def may_be_label(name, others):
    """Whether a task may have a label of this name next to others."""
    try:
        return bool(Task(task_labels=[*others, name]))
    except ValidationError:
        return False


def kind_of_column(cells, name, path):
    """(kind, classes or None, facts); kind '' for a column that is no label."""
    ranks = {word: grade_ranks(word) for word in cells[name].dropna().unique()}
    numbers = cells.assign(**{name: cells[name].mask(cells[name] == "None")})
    task, text, listener = Task(task_labels=[name]), numbers[name].dropna(), Collected()
    values = label_values(numbers, task, path, listener)
    errors = [finding.text for finding in listener.findings if finding.level == "ERROR"]
    y = values[name].dropna()
    n_words = len(text) - len(y)
    unusable = f"{n_words} of {len(text)} cells are not numbers"
    if n_words and 2 <= len(ranks) <= MOST_CLASSES and None not in ranks.values():
        classes = sorted(ranks, key=lambda word: (ranks[word], word))
        counts = cells[name].value_counts()
        facts = ", ".join(f"{word} {counts[word]}" for word in classes)
        return "multiclass", classes, f"{facts}; check the order of the classes"
    if errors:
        words = f"{unusable}; if they are grades, add a task with their classes"
        return "", None, words if "not numbers" in errors[0] else errors[0].split(": ", 1)[-1]
    task = decide_kinds(values, task, path, listener)
    (label,) = task.outputs.each
    n, unusable = y.nunique(), f", {unusable}" * bool(n_words)
    if why := label.why_constant(y):
        return "", None, why + unusable
    each = y.groupby(cells["pid"]).nunique()
    like_ids = n > 20 and (y % 1 == 0).all() and (n == len(y) or n == each.sum() == len(each))
    if label.kind == "regression" and like_ids:
        return "", None, "each study or patient has another whole number, as in ids"
    facts = label.summary(y) + unusable
    if label.kind == "regression" and n <= MOST_CLASSES and len(y) > 3 * n:
        facts += f", only {n} values: if these are grades, give it classes"
    return label.kind, None, facts


# -------------------------------------------------------------------------------------- next line


def next_line(root, files, datasets, tasks):
    """The command line to type after `init`."""
    inside = "" if root == Path() else f"cd {root} && "
    if tasks and files.embeddings:
        return f"{inside}{PROGRAM} check --task {next(iter(tasks))}"
    if tasks and files.videos:
        name, base = next(iter(datasets)), relative_path(files.videos[0], root)
        line = f"{inside}{EXTRACT} {base} --out {datasets[name][1]['embedding_path']}"
        manifest = files.manifest and relative_path(files.manifest, root)
        return line + f" --manifest {manifest}" * bool(manifest)
    if datasets:
        model = next(iter(releases.registry()))
        videos = relative_path(files.videos[0], root) if files.videos else ""
        what = f"--videos {videos}" if videos else f"--dataset {next(iter(datasets))}"
        get = f"{PROGRAM} download {model} && {PROGRAM} predict --model_name {model}"
        return f"{inside}{get} {what}"
    return f"{PROGRAM} demo"
