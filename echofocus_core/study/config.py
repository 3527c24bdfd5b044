"""The user's config, and the record of a model in its checkpoint."""

import json
import math
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    WrapValidator,
    field_validator,
    model_validator,
)

from echofocus_core import EMBED_DIM
from echofocus_core.base.console import PROGRAM, UserError, nearest, printable
from echofocus_core.base.files import packed_path
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
    shown,
    validate_as,
)
from echofocus_core.study.outputs import KINDS, Outputs

PUBLISHED_BOXCOX = ("LD05", "LM12", "LS04", "LA34", "RA06")
SPLIT = "split_path"  # the name of the column with the folds of such a file
PUBLISHED_RANGES = {"EF05": (0, None), "LM12": (0, None)}  # outside is a typing error: missing
MODELS = Path("trained_models")
CONFIGS = (Path("config.json"), Path("config-example.json"))
RECORD_FORMAT = 1

# ---------------------------------------------------------------------------------- values of keys


def numbers_as_text(names):
    """Names of labels or classes; they may be numbers."""
    if not isinstance(names, list):
        return names
    return [str(x) if type(x) in (int, float) else x for x in names]


def range_of(ends):
    numbers = isinstance(ends, list) and len(ends) == 2
    if not numbers or not all(x is None or (type(x) in (int, float) and x == x) for x in ends):
        raise ValueError("[low, high], null for no limit")
    if None not in ends and ends[0] > ends[1]:
        raise ValueError(f"[low, high] is upside down: {ends[0]} is above {ends[1]}")
    return ends


def kinds_of(value):
    """A task's `type`: a kind, or a dict of labels' kinds."""
    if isinstance(value, str) and not value:
        return value
    for kind in value.values() if isinstance(value, dict) else [value]:
        if not isinstance(kind, str) or kind not in KINDS:
            names = ", ".join(KINDS)
            hint = nearest(kind, KINDS) if isinstance(kind, str) else ""
            raise ValueError(
                f'one of {names}, or one for each label as in {{"VSD": "binary"}}, not '
                f"{shown(kind)}{hint}"
            )
    return value


def event_codes(value):
    """{code: 0 or 1} for all survival labels, or label -> such a dict."""
    for codes in value.values() if isinstance(value, dict) else [value]:
        if isinstance(codes, dict):
            event_codes(codes)
        elif type(codes) is not int or codes not in (0, 1):
            raise ValueError('codes and their meaning, 1 for an event, as in {"1": 0, "2": 1}')
    return value


def class_names(value):
    plain = {str(x).strip().casefold() for x in value} if isinstance(value, list) else ()
    if len(plain) < 2 or len(plain) < len(value):
        raise ValueError("the names of two classes or more, in order, none twice")
    return numbers_as_text(value)


def whole_number(value):
    """A number, or its digits: attributes of a file are compared as text."""
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 9 else value


def one_or_several(value, validate):
    """A path, or a list of two or more."""
    if not isinstance(value, list):
        return validate(value)
    if not value:
        raise ValueError("names no folder")
    return [validate(x) for x in value] if len(value) > 1 else validate(value[0])


def for_config(settings):
    """Refuse settings of a task or dataset that are only for the command line."""
    if odd := sorted(settings.model_fields_set - IN_CONFIG):
        raise ValueError(f"{', '.join(odd)}: for the command line, not for the config")
    return settings


Labels = Annotated[list[Text], Field(max_length=MOST_LABELS), BeforeValidator(numbers_as_text)]
ByLabel = dict[Text, Text]
Range = Annotated[list, BeforeValidator(range_of)]
Kinds = Annotated[str | dict[Text, str], BeforeValidator(kinds_of)]
ClassNames = Annotated[list[Text], BeforeValidator(class_names)]
TimeAndEvent = Annotated[list[Text], Field(min_length=2, max_length=2)]
EventCodes = Annotated[dict[Text, Any], BeforeValidator(event_codes)]
ForConfig = Annotated[Settings, AfterValidator(for_config)]
Plain = Text | int | float | None
Whole = Annotated[int | None, BeforeValidator(whole_number)]

# -------------------------------------------------------------------------------- labels and kinds

OWN_COLUMNS = ("pid", "eid", "PID", "Echo_ID", "n_videos", "n_clips", "novelty", "warning")
OWN_ENDS = ("_low", "_high", "_sd", "_decision", "_threshold", "_Correct", "_Predict")


class Labelled(Entry):
    """Labels and their kinds, in a task or in a model's record."""

    model_config = ConfigDict(frozen=True, str_strip_whitespace=True)

    level: Literal["study", "video"] = "study"  # of what the labels are
    type: Kinds = ""  # of all labels, or label -> kind; the values decide where it is missing
    classes: dict[Text, ClassNames] = Field({})  # multiclass label -> names of classes, in order
    survival: dict[Text, TimeAndEvent] = Field({})  # survival label -> its columns [time, event]
    units: ByLabel = Field({})  # label -> unit, for tables and figures

    def kind(self, label):
        """A label's kind; '' if not given, so that the values decide."""
        kind = self.type.get(label, "") if isinstance(self.type, dict) else self.type
        for other in KINDS.values():
            if not kind and other.task_key and label in getattr(self, other.task_key):
                kind = other.kind
        return kind

    def columns_of(self, label):
        """The columns of the label table for a label."""
        return self.survival.get(label, [label])

    def outputs_of(self, labels):
        return Outputs.of(labels, {label: self.kind(label) for label in labels}, self.classes)

    def label_faults(self, labels, *keys):
        """What is wrong between the labels and the keys that name some of them, in lines."""
        if not labels or len(set(labels)) < len(labels):
            return ["labels must name at least one label, and none twice"]
        faults, outputs = [], self.outputs_of(labels)
        for label in labels:
            for key in {kind.task_key for kind in KINDS.values()} - {""}:
                kinds = [name for name, kind in KINDS.items() if kind.task_key == key]
                if (self.kind(label) in kinds) != (label in getattr(self, key)):
                    names = " or ".join(kinds)
                    faults.append(f"{key} and type {names} of {label}: one is missing")
        for key in ("type", "classes", "survival", "units", *keys):
            named = getattr(self, key)
            for name in () if isinstance(named, str) else named or ():
                if name not in labels and name not in outputs.names:
                    hint = nearest(name, labels)
                    faults.append(f"{key} has {printable(name)[:60]}, which is not a label{hint}")
        for label in outputs.each:
            unit, allowed = self.units.get(label.name), label.allowed_units
            if unit is not None and allowed and unit.strip().casefold() not in allowed:
                faults.append(
                    f"the unit of {label.name} is one of {', '.join(allowed)}, not {unit}"
                )
        return faults + column_faults(outputs, self.units)


def column_faults(outputs, units):
    """Errors for labels whose columns in our tables would have the name of another column."""
    owners, faults = dict.fromkeys(OWN_COLUMNS, "our tables"), []
    for label in outputs.each:
        names = dict.fromkeys([label.name, *label.outputs])
        columns = [name + end for name in names for end in ("", *OWN_ENDS)]
        columns += [f"{label.name} [{units[label.name]}]"] if label.name in units else []
        columns += label.more_columns
        for column in columns:
            if column in owners:
                whose = f"{owners[column]} and {label.name}"
                faults.append(f"{whose} would share the column {column}")
        owners |= dict.fromkeys(columns, label.name)
    for label in outputs.of_kind("survival"):
        timed = f"{label}_survival_"
        faults += [
            f"{label} and {other} would share the column {other}"
            for other in outputs.labels
            if other.startswith(timed)
        ]
    return faults


# ------------------------------------------------------------------------------------------- config


def with_options(values):
    """Options that are plain keys of a task or dataset are moved into its `settings`."""
    if not isinstance(values, dict):
        return values
    options = IN_CONFIG - {"level"}  # which is a key of tasks
    plain = {k: v for k, v in values.items() if SYNONYMS.get(k, k) in options}
    rest, settings = {k: v for k, v in values.items() if k not in plain}, values.get("settings", {})
    if not plain or not isinstance(settings, dict):
        return rest
    return rest | {"settings": one_name(plain, one_name(settings))}


class Task(Labelled):
    """What to learn: label names in order and how to read them."""

    task_labels: Labels
    label_path: Location | None = None
    columns: ByLabel = Field({})  # pid, eid or a label -> its column in the label table
    events: EventCodes = Field({})  # code in the event column of survival labels -> 0 or 1
    names: ByLabel = Field({})  # label -> what a reader calls it, for the page
    boxcox: Labels | None = None  # labels that Box-Cox transforms; None: the published five
    valid_range: dict[str, Range] | None = None  # label -> [low, high]; None: the published two
    settings: ForConfig = Settings()  # options, for this task

    plain_options = model_validator(mode="before")(with_options)

    @model_validator(mode="after")
    def agree(self):
        faults = self.label_faults(self.task_labels, "names", "boxcox", "valid_range")
        ranged = ["", *(kind.kind for kind in KINDS.values() if kind.is_number)]
        for key, useful in (("boxcox", ("", "regression")), ("valid_range", ranged)):
            for label in getattr(self, key) or ():
                if self.kind(label) not in useful:
                    faults.append(f"{key} has no effect on {label}, which is {self.kind(label)}")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def limits(self, label):
        """The least and the greatest value that a label may have."""
        ranges = PUBLISHED_RANGES if self.valid_range is None else self.valid_range
        low, high = ranges.get(label, (None, None))
        return -math.inf if low is None else low, math.inf if high is None else high

    @property
    def outputs(self):
        """The outputs of a model of this task."""
        return self.outputs_of(self.task_labels)


class Dataset(Entry):
    """The clip embeddings of a cohort, and its label table and videos, if any."""

    model_config = ConfigDict(frozen=True, str_strip_whitespace=True)

    # A list: folders of several encoders
    embedding_path: Annotated[Location, WrapValidator(one_or_several)]
    label_path: Location | None = None
    split_path: Location | None = None  # JSON of patients and their folds
    path_pattern: str = ""  # regular expression with (?P<pid>) and (?P<eid>), for lists of videos
    columns: ByLabel = Field({})  # of its label table, before those of the task
    video_base_path: Location | None = None  # holds a folder of videos for each study, called:
    video_subdir_format: str = "{echo_id}_trim"
    views: Location | None = None  # a table of eid, video, view, for importance by view
    settings: ForConfig = Settings()  # options, for this dataset

    plain_options = model_validator(mode="before")(with_options)

    @model_validator(mode="after")
    def folds_of_file(self):
        lists = self.label_path and not self.label_path.suffix  # a folder of lists, one a fold
        if (self.split_path or lists) and not self.settings.split_column:
            vars(self)["settings"] = self.settings.model_copy(update={"split_column": SPLIT})
        return self

    @property
    def embedding_paths(self):
        """The clip embeddings of each encoder."""
        several = isinstance(self.embedding_path, list)
        return self.embedding_path if several else [self.embedding_path]

    @property
    def is_of_videos(self):
        """Whether it has videos and no clip embeddings yet: commands with a model extract them."""
        path, *more = self.embedding_paths
        exists = path.exists() or packed_path(path).exists()
        return self.video_base_path is not None and not exists and not more

    @field_validator("video_subdir_format")
    @classmethod
    def one_folder(cls, text):
        before, id_, after = text.partition("{echo_id}")
        odd = set(before + after) & set("{}\0\\") or ".." in text or text.startswith("/")
        if not id_ or odd or len(text) > 200:
            raise ValueError("a folder's name with {echo_id} in it, below video_base_path")
        return text


class ConfigFile(Entry):
    """The config as it is written."""

    task: Annotated[dict[Name, Task], Field(min_length=1)]
    dataset: Annotated[dict[Name, Dataset], Field(min_length=1)]


@dataclass(frozen=True)
class Config:
    """Tasks and datasets by name; paths are relative to the current folder."""

    path: Path = Path("(none)")
    tasks: dict[str, Task] = field(default_factory=dict)
    datasets: dict[str, Dataset] = field(default_factory=dict)

    def pick(self, kind, name):
        """The name of a task or dataset, the first when none is named ('' of an empty config).

        Raises UserError.
        """
        entries = self.tasks if kind == "task" else self.datasets
        if not name:
            return next(iter(entries), "")
        if name not in entries:
            raise UserError(
                f"{self.path} has no {kind} {name}{nearest(name, entries)} (it has: "
                f"{', '.join(entries)})"
            )
        return name


def read_config(path="", needed=True, instead=""):
    """Read and check the JSON config; paths in it are relative to its folder. Raises UserError.

    Lines that begin with // are comments. Where it is not needed and does not exist, the result has
    no task and no dataset. instead: what the user can do without a config.
    """
    if not path and not needed and not any(p.is_file() for p in CONFIGS):
        return Config()
    path = Path(path) if path else next((p for p in CONFIGS if p.is_file()), CONFIGS[0])
    try:
        text = re.sub(r"(?m)^\s*//.*$", "", path.read_text(encoding="utf-8-sig"))
        raw = json.loads(text, object_pairs_hook=without_repeats)
    except OSError as error:
        raise UserError(f"no config {path}; {PROGRAM} init writes one{instead}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    file = validate_as(ConfigFile, raw, str(path))
    sections = [
        {name: with_paths(entry, path.parent) for name, entry in section.items()}
        for section in (file.task, file.dataset)
    ]
    return Config(path, *sections)


def with_paths(entry, folder):
    """A task or dataset whose paths are relative to the current folder, not to `folder`."""

    def place(value):
        return [place(x) for x in value] if isinstance(value, list) else folder / value.expanduser()

    keys = [key for key, value in dict(entry).items() if isinstance(value, Path)]
    keys += ["embedding_path"] if isinstance(entry, Dataset) else []
    return entry.model_copy(update={key: place(getattr(entry, key)) for key in keys})


def without_repeats(pairs):
    """A JSON object as a dict; JSON would keep only the last value of a repeated key."""
    values = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key '{printable(key)[:60]}' is repeated in one object")
        values[key] = value
    return values


# -------------------------------------------------------------------------- a checkpoint's record


class Input(Entry):
    """What a model was trained on: attributes that its embedding files share, and their norms."""

    encoder: Plain = None  # None: PanEcho, or not recorded
    weights_sha256: Plain = None
    weights: Plain = None  # the file's name
    size: Whole = None
    clip_len: Whole = None
    n_clips: Whole = None
    sampling: Plain = None
    mask: Literal["none", "sector"] | None = None
    perturb: Plain = None
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
        if not (rising and never_falls) or len(self.times) != len(self.cumulative):
            raise ValueError("a cumulative hazard never falls")
        return self

    @property
    def end(self):
        return self.times[-1]


MISSING_LABELS = (
    "trained when a study's loss was divided by its number of known labels, which biases "
    "probabilities where labels are missing for a reason: train it again"
)


class Record(Labelled):
    """The `echofocus` entry of checkpoints: what training used and what predictions need."""

    format: Literal[1] = RECORD_FORMAT
    version: str = ""
    task: Name = ""
    dataset: Name = ""
    labels: Labels = Field([])  # in output order
    hazards: dict[str, Hazard] = Field({})  # of survival labels
    unlearnt: list[str] = Field([])  # outputs that had no two values in training
    thresholds: dict[str, float] = Field({})  # label -> probability that counts as present
    ranges: dict[str, tuple[float, float]] = Field({})  # measurement -> ends of the training fold
    train_patients: int = 0  # of the training fold; 0: not recorded
    labels_sha256: str = ""
    embeddings: str = ""  # name of their folder
    encoder_sha256: str = ""
    input: Input = Input()
    width: int | list[int] = EMBED_DIM  # features of a clip embedding; a list: of each encoder
    encoders: dict[Text, Input] = Field({})  # where it joins several: name -> its input
    settings: Settings = Settings()  # RECORDED of them
    loss_over_all_labels: bool = False  # earlier losses were divided by a study's known labels

    @property
    def biased_if_missing(self):
        """Whether missing labels biased its probabilities, see MISSING_LABELS."""
        return bool(self.task) and len(self.labels) > 1 and not self.loss_over_all_labels

    @model_validator(mode="after")
    def agree(self):
        faults = self.label_faults(self.labels, "hazards", "unlearnt", "thresholds", "ranges")
        faults += [f"type of label {x} is missing" for x in self.labels if not self.kind(x)]
        if self.task and faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def inputs(self):
        """Name of an encoder ('' for the only one) -> Input."""
        return self.encoders or {"": self.input}

    @property
    def outputs(self):
        """The outputs of the model."""
        return self.outputs_of(self.labels)

    def to_save(self):
        """As plain Python values, with the settings that decide the weights and no others."""
        settings = {name: getattr(self.settings, name) for name in RECORDED}
        saved = self.model_dump(exclude={"settings", "input", "encoders"})
        if self.encoders:
            saved["encoders"] = {k: x.model_dump(exclude_none=True) for k, x in self.inputs.items()}
        return saved | {"settings": settings, "input": self.input.model_dump(exclude_none=True)}


def read_record(saved, file):
    """The Record in a checkpoint's dict; None in a published one. Raises UserError."""
    if "echofocus" not in saved:
        return None
    raw = saved["echofocus"]
    number = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(number, int) and number != RECORD_FORMAT:
        raise UserError(
            f"{file}: its record has the format {number}, this program reads {RECORD_FORMAT}; "
            "update it, or use another model"
        )
    record = validate_as(Record, raw, f"{file}, its record")
    if missing := {"format", "task", "labels", "type"} - record.model_fields_set:
        raise UserError(f"{file}, its record: '{min(missing)}' is missing")
    return record
