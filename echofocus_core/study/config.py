"""Who wins: typed options, the config, a model's own record; the last two are declared here."""

import json
import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from echofocus_core.base.console import UserError, nearest, printable
from echofocus_core.base.options import (
    IN_CONFIG,
    MOST_LABELS,
    RECORDED,
    SYNONYMS,
    Entry,
    Location,
    Name,
    Settings,
    Text,
    one_name,
    readable_text,
    shown,
    validated,
)
from echofocus_core.study.outputs import EVENT, KINDS, Outputs

PUBLISHED_BOXCOX = ("LD05", "LM12", "LS04", "LA34", "RA06")
PUBLISHED_RANGES = {"EF05": (0, None), "LM12": (0, None)}  # outside is a typing error: missing
MODELS = Path("trained_models")
CONFIGS = (Path("config.json"), Path("config-example.json"))

# ------------------------------------------------------------------------------------------- config


def with_options(values):
    """Options that stand as plain keys of a task or dataset are moved into its `settings`."""
    if not isinstance(values, dict):
        return values
    settings, rest = values.get("settings", {}), {}
    options = IN_CONFIG - {"level"}  # which is a task's own
    plain = {k: v for k, v in values.items() if SYNONYMS.get(k, k) in options}
    rest = {k: v for k, v in values.items() if k not in plain}
    if not plain or not isinstance(settings, dict):
        return rest
    return rest | {"settings": one_name(plain, one_name(settings))}


def for_config(settings):
    """Refuse settings of a task or dataset that are for the command line alone."""
    if odd := sorted(settings.model_fields_set - IN_CONFIG):
        raise ValueError(f"{', '.join(odd)}: for the command line, not for the config")
    return settings


def as_labels(value):
    """Label names, stripped; numbers are names too."""
    if isinstance(value, list):
        value = [str(x) if type(x) in (int, float) else x for x in value]
        value = [x.strip() if isinstance(x, str) else x for x in value]
    return value


def by_label(value):
    if not isinstance(value, dict):
        return value
    return {k.strip() if isinstance(k, str) else k: v for k, v in value.items()}


def range_of(ends):
    numbers = isinstance(ends, list) and len(ends) == 2
    if not numbers or not all(x is None or (type(x) in (int, float) and x == x) for x in ends):
        raise ValueError("[low, high], null for no limit")
    if None not in ends and ends[0] > ends[1]:
        raise ValueError(f"[low, high] is upside down: {ends[0]} is above {ends[1]}")
    return ends


OWN_COLUMNS = ("pid", "eid", "PID", "Echo_ID", "n_videos", "n_clips", "novelty", "warning")
OWN_ENDS = ("_low", "_high", "_sd", "_decision", "_threshold", "_Correct", "_Predict")


def names_beside(classes, survival):
    """The names of outputs that are no labels."""
    risks = [f"{label}_risk" for label in survival]
    return [f"{label}_{name}" for label, names in classes.items() for name in names] + risks


def label_faults(labels, units, names=(), survival=()):
    """What is wrong with label names, in lines: none, one twice, or one that is our column.

    names: of the outputs, where they are others than the labels; survival: labels of that kind.
    """
    if (n := len(labels) + len(names)) > MOST_LABELS:
        return [f"{n} labels, with their classes; a model has {MOST_LABELS} at most"]
    if not labels or len(set(labels)) < len(labels):
        return ["task_labels must name at least one label, and none twice"]
    taken, faults = dict.fromkeys(OWN_COLUMNS), []
    made = {f"{x}{end}": x for x in survival for end in (EVENT, "_event")}
    with_units = [(x, [x, f"{x} [{units[x]}]"] if units.get(x) else [x]) for x in labels]
    for label, columns in [*with_units, *((name, [name]) for name in names)]:
        for column in columns:
            whose = taken.get(column) or made.get(column)
            timed = [x for x in survival if column.startswith(f"{x}_survival_")]
            if whose or timed:
                whose = whose or timed[0]
                faults.append(f"labels {whose} and {label} would share a column {column}")
            elif column in taken:
                faults.append(f"{column} is a column of our tables and cannot be a label")
            taken[column] = label
    for label in (*labels, *names):
        faults += [
            f"{label}{end} is a column of our tables, for {label}, and cannot be a label"
            for end in OWN_ENDS
            if label + end in taken
        ]
    return faults


def kinds_of(value):
    """A task's `type`: a kind, or a dict of labels' kinds; the nearest name where it is neither."""
    told = list(value.values()) if isinstance(value, dict) else [value]
    for kind in told:
        known = isinstance(kind, str) and kind in (*KINDS, "")
        if not known or (kind == "" and told != [value]):
            names = ", ".join(KINDS)
            raise ValueError(f"one of {names}, not {shown(kind)}{nearest(kind, KINDS)}")
    return by_label(value)


def pair_of_columns(value):
    if not isinstance(value, list) or len(value) != 2 or value[0] == value[1]:
        raise ValueError("two columns, [time, event]")
    return value


def class_names(value):
    plain = {str(x).strip().casefold() for x in value} if isinstance(value, list) else ()
    if len(plain) < max(2, len(value) if isinstance(value, list) else 2):
        raise ValueError("the names of two classes or more, in order, none twice")
    return as_labels(value)


Labels = Annotated[list[Text], BeforeValidator(as_labels)]
Units = Annotated[dict[Text, Text], BeforeValidator(by_label)]
Range = Annotated[list, BeforeValidator(range_of)]
Kinds = Annotated[str | dict[Text, str], BeforeValidator(kinds_of)]
Classes = Annotated[
    dict[Text, Annotated[list[Text], BeforeValidator(class_names)]], BeforeValidator(by_label)
]
TimeAndEvent = Annotated[list[Text], BeforeValidator(pair_of_columns)]
Survival = Annotated[dict[Text, TimeAndEvent], BeforeValidator(by_label)]
ForConfig = Annotated[Settings, AfterValidator(for_config)]


BY_NUMBER = ("", "regression", "survival")  # kinds that are numbers, whose range may be given


class Task(Entry):
    """What to learn: label names in order and how to read them."""

    task_labels: Labels
    label_path: Location | None = None
    level: Literal["study", "video"] = "study"  # of what the labels are
    type: Kinds = ""  # of all labels, or label -> kind; what is not said is decided by the values
    classes: Classes = Field({})  # multiclass label -> names of its classes, in order
    survival: Survival = Field({})  # survival label -> its columns [time, event]
    units: Units = Field({})  # label -> unit, for tables and figures
    names: Units = Field({})  # label -> what a reader calls it, for the page
    boxcox: Labels | None = None  # labels made normal by Box-Cox; None: the published five
    # label -> [low, high]; None: the published two
    valid_range: Annotated[dict[str, Range], BeforeValidator(by_label)] | None = None
    settings: ForConfig = Settings()  # options, for this task

    plain_options = model_validator(mode="before")(with_options)

    @model_validator(mode="after")
    def agree(self):
        names = names_beside(self.classes, self.survival)
        faults = label_faults(self.task_labels, self.units, names, self.survival)
        for label in self.task_labels:
            for kind, key in (("multiclass", "classes"), ("survival", "survival")):
                if (self.kind(label) == kind) != (label in getattr(self, key)):
                    faults.append(f"{key} is for labels of type {kind}: {label} has one of the two")
        for key, useful in (("boxcox", ("", "regression")), ("valid_range", BY_NUMBER)):
            faults += [
                f"{key} does nothing for {x}, which is {self.kind(x)}"
                for x in getattr(self, key) or ()
                if x in self.task_labels and self.kind(x) not in useful
            ]
        kinds = self.type if isinstance(self.type, dict) else {}
        for key in ("units", "names", "boxcox", "valid_range", "classes", "survival", "type"):
            there = kinds if key == "type" else getattr(self, key)
            faults += [
                f"{key} has {printable(x)[:60]}, which is no label{nearest(x, self.task_labels)}"
                for x in there or ()
                if x not in self.task_labels
            ]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def kind(self, label):
        """A label's kind, '' where it is not said: the values decide."""
        told = self.type.get(label, "") if isinstance(self.type, dict) else self.type
        other = "survival" if label in self.survival else ""
        return told or ("multiclass" if label in self.classes else other)

    def columns_of(self, label):
        """The columns of the label table that a label is read from."""
        return self.survival.get(label, [label])

    def limits(self, label):
        """The least and the greatest value that a label may have."""
        ranges = PUBLISHED_RANGES if self.valid_range is None else self.valid_range
        low, high = ranges.get(label, (None, None))
        return -math.inf if low is None else low, math.inf if high is None else high

    @property
    def outputs(self):
        """What a model of this task gives out; see `Label` for kinds that are not decided."""
        kinds = {label: self.kind(label) for label in self.task_labels}
        return Outputs.of(self.task_labels, kinds, self.classes)


class Dataset(Entry):
    """Where a cohort's clip embeddings lie, and its own label table and videos if it has them."""

    embedding_path: Location
    label_path: Location | None = None
    video_base_path: Location | None = None  # holds a folder of videos a study, called:
    video_subdir_format: str = "{echo_id}_trim"
    views: Location | None = None  # a table of eid, video, view, for importance by view
    settings: ForConfig = Settings()  # options, for this dataset

    plain_options = model_validator(mode="before")(with_options)

    @property
    def is_of_videos(self):
        """Whether it has videos and no clip embeddings yet: commands with a model extract them."""
        from echofocus_core.base.files import packed_path

        made = self.embedding_path.exists() or packed_path(self.embedding_path).exists()
        return self.video_base_path is not None and not made

    @field_validator("video_subdir_format")
    @classmethod
    def one_folder(cls, text):
        rest = text.replace("{echo_id}", "", 1)
        odd = set(rest) & set("{}\0\\") or ".." in text or text.startswith("/")
        if rest == text or odd or len(text) > 200:
            raise ValueError("a folder's name with {echo_id} in it, below video_base_path")
        return text


class ConfigFile(Entry):
    """The config as it is written."""

    task: Annotated[dict[Name, Task], Field(min_length=1)]
    dataset: Annotated[dict[Name, Dataset], Field(min_length=1)]


@dataclass
class Config:
    """Tasks and datasets by name; paths are relative to the current folder."""

    path: Path = Path("(none)")
    tasks: dict[str, Task] = field(default_factory=dict)
    datasets: dict[str, Dataset] = field(default_factory=dict)

    def pick(self, kind, name):
        """The name of a task or dataset, the first when none is named ('' of an empty config).

        Raises UserError.
        """
        there = self.tasks if kind == "task" else self.datasets
        if not name:
            return next(iter(there), "")
        if name not in there:
            raise UserError(
                f"{self.path} has no {kind} {name}{nearest(name, there)} (it has: "
                f"{', '.join(there)})"
            )
        return name


def read_config(path="", needed=True):
    """Read and check the JSON config; paths in it are relative to its folder. Raises UserError.

    Where it is not needed and there is none, the result has no task and no dataset.
    """
    if not path and not needed and not any(p.is_file() for p in CONFIGS):
        return Config()
    path = Path(path) if path else next((p for p in CONFIGS if p.is_file()), CONFIGS[0])
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=without_repeats)
    except OSError as error:
        raise UserError(f"no config {path}; copy config-example.json and edit it") from error
    except RecursionError:
        raise UserError(f"{path} is no config: it is nested too deep") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    file = validated(ConfigFile, raw, str(path))
    for entry in (*file.task.values(), *file.dataset.values()):
        for key in type(entry).model_fields:
            if isinstance(there := getattr(entry, key), Path):
                setattr(entry, key, path.parent / there.expanduser())
    return Config(path, file.task, file.dataset)


def without_repeats(pairs):
    """A JSON object as a dict; of a key that stands twice JSON would keep the last in silence."""
    values = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key '{printable(key)[:60]}' stands twice in one object")
        values[key] = value
    return values


# ------------------------------------------------------------------------- a checkpoint's record


def plain_value(value):
    if type(value) not in (str, int, float) or (type(value) is float and not math.isfinite(value)):
        raise ValueError(f"text or a number, not {shown(value)}")
    return readable_text(value) if type(value) is str else value


def whole_number(value):
    """A number, or its digits: attributes of a file are compared as text."""
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 9 else value


Plain = Annotated[Any, AfterValidator(plain_value)]
Whole = Annotated[int | None, BeforeValidator(whole_number)]


class Input(Entry):
    """What a model was trained on: attributes that its embedding files share, and their norms."""

    weights_sha256: Plain = None
    weights: Plain = None  # the file's name
    size: Whole = None
    clip_len: Whole = None
    n_clips: Whole = None
    sampling: Plain = None
    mask: Literal["none", "sector"] | None = None
    norm_mean: float | None = None  # of a study's clip embeddings, over studies
    norm_sd: float | None = None


class Hazard(Entry):
    """What makes a survival label's output a probability: see `study.metrics.breslow`."""

    mean: float  # of the log hazards
    times: list[float] = Field(min_length=2, max_length=1000)
    cumulative: list[float]

    @model_validator(mode="after")
    def rises(self):
        rising = all(a < b for a, b in pairwise(self.times)) and self.times[0] == 0
        never_falls = all(a <= b for a, b in pairwise([0.0, *self.cumulative]))
        finite = all(map(math.isfinite, [self.mean, *self.times, *self.cumulative]))
        if not (rising and never_falls and finite) or len(self.times) != len(self.cumulative):
            raise ValueError("a cumulative hazard never falls")
        return self

    @property
    def end(self):
        return self.times[-1]


class Record(Entry):
    """The `echofocus` entry of our own checkpoints: what training used and what a user needs."""

    format: Literal[1] = 1
    version: str = ""
    task: Name = ""
    dataset: Name = ""
    labels: list[Text] = Field([])  # in output order
    level: Literal["study", "video"] = "study"
    type: Kinds = ""
    classes: Classes = Field({})
    survival: Survival = Field({})  # the columns that these labels were read from
    hazards: dict[str, Hazard] = Field({})  # of survival labels
    units: Units = Field({})
    unlearnt: list[str] = Field([])  # outputs that had no two values in training
    thresholds: dict[str, float] = Field({})  # label -> probability that counts as present
    labels_sha256: str = ""
    encoder_sha256: str = ""
    input: Input = Input()
    settings: Settings = Settings()  # RECORDED of them

    @model_validator(mode="after")
    def agree(self):
        names = names_beside(self.classes, self.survival)
        faults = label_faults(self.labels, self.units, names, self.survival)
        plain = [x for x in self.labels if x not in (*self.classes, *self.survival)]
        risks = [f"{label}_risk" for label in self.survival]
        for key, known in (
            ("unlearnt", [*plain, *names]), ("thresholds", plain), ("hazards", risks),
            ("units", self.labels),
        ):  # fmt: skip
            odd = [x for x in getattr(self, key) if x not in known]
            faults += [f"{key} has {printable(x)[:60]}, which is no label" for x in odd]
        kinds = self.type if isinstance(self.type, dict) else dict.fromkeys(self.labels, self.type)
        if set(kinds) != set(self.labels):
            faults.append("type names other labels than there are")
        for of_kind, there in (("multiclass", self.classes), ("survival", self.survival)):
            if {label for label, kind in kinds.items() if kind == of_kind} != set(there):
                faults.append(f"what stands for labels of type {of_kind} is of other labels")
        if faults and self.task:
            raise ValueError("\n".join(faults))
        return self

    @property
    def outputs(self):
        """What the model gives out; of a record that says its `type`."""
        return Outputs.of(self.labels, self.type, self.classes)

    def to_save(self):
        """As plain Python values, with the settings that decide the weights and no others."""
        settings = {name: getattr(self.settings, name) for name in RECORDED}
        saved = self.model_dump(exclude={"settings", "input"})
        return saved | {"settings": settings, "input": self.input.model_dump(exclude_none=True)}


def from_format_0(old):
    """Until 0.1.0 the record had no format, and every option of every command beside the facts."""
    facts = {n: old[n] for n in Record.model_fields if n != "settings" and old.get(n) is not None}
    settings = {n: old[n] for n in RECORDED if old.get(n) is not None}
    return facts | {"settings": settings, "format": 1}


PATCHES = (from_format_0,)  # the patch at place n makes format n into n + 1


def read_record(saved, file):
    """The Record in a checkpoint's dict, whatever its format; None in a published one.

    Raises UserError for one that cannot be used.
    """
    raw = saved.get("echofocus")
    if "echofocus" not in saved:
        return None
    if not isinstance(raw, dict):
        raise UserError(f"{file}: its 'echofocus' entry is a {type(raw).__name__}, not a dict")
    number = raw.get("format", 0)
    if type(number) is not int or not 0 <= number <= len(PATCHES):
        raise UserError(
            f"{file}: its record has the format {shown(number)}, this program reads 0 to "
            f"{len(PATCHES)}; update it, or take another model"
        )
    for patch in PATCHES[number:]:
        raw = patch(raw)
    for name in ("task", "labels"):
        if name not in raw:
            raise UserError(f"{file}, its record: '{name}' is missing")
    return validated(Record, raw, f"{file}, its record")
