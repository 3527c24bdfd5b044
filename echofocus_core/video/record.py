"""The record in an encoder's weights file: its tasks and its training; validated when read."""

import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, AliasChoices, Field, model_validator

from echofocus_core.base.console import UserError
from echofocus_core.base.options import Entry, Text, readable_text, validate_as

KINDS = {
    "binary": "binary_classification",
    "multi-class": "multi-class_classification",
    "regression": "regression",
}
N_CLASSES = {"binary": (0, 2), "multi-class": range(3, 1000), "regression": (0,)}


def task_name(name):
    """Check the name of a task, which is also used for a module and a folder."""
    if not re.fullmatch(r"[A-Za-z0-9_|() -]{1,100}", name) or name != name.strip():
        raise ValueError(f"task name {ascii(name)[:60]}: use only letters, digits, - _ | ( )")
    return name


Word = Annotated[str, AfterValidator(lambda text: text and readable_text(text))]  # or nothing


class EncoderTask(Entry):
    """One task head: name, kind, and classes in output order or unit."""

    name: Annotated[str, AfterValidator(task_name)]
    type: Literal[(*KINDS, *KINDS.values())]
    classes: list[Text] = Field(
        [],
        validation_alias=AliasChoices("class_names", "classes"),
        serialization_alias="class_names",
    )
    unit: Word = ""
    mean: float = 0.0  # over the training labels

    @model_validator(mode="after")
    def check_classes(self):
        n, kind = len(self.classes), self.type.split("_")[0]
        if len({c.lower() for c in self.classes}) < n:
            raise ValueError(f"{self.name}: two classes have the same name")
        if n not in N_CLASSES[kind]:
            raise ValueError(f"{self.name} has {n} classes; a binary task has two (no, yes), a "
                             "multi-class task three or more, a regression none")  # fmt: skip
        return self

    def entry(self):
        """As an entry of `panecho.TASKS`."""
        kind = KINDS.get(self.type, self.type)
        classes = self.classes or (["0.0", "1.0"] if kind.startswith("binary") else [])
        entry = {"name": self.name, "type": kind, "class_names": classes, "mean": self.mean}
        return entry | ({"unit": self.unit} if kind == "regression" else {})


class EncoderRecord(Entry):
    """The `encoder` entry of weights that `embed/train.py` wrote."""

    tasks: Annotated[list[EncoderTask], Field(max_length=1000)]
    format: Literal[1] = 1
    version: Word = ""
    cohort: Word = ""
    model_name: Text = "frame_transformer"
    arch: Word = "convnext_tiny"
    normalization: Word = "imagenet"
    size: int = 224
    clip_len: int = 16
    layers: Annotated[int, Field(ge=0, le=100)] = 4
    heads: Annotated[int, Field(ge=1, le=1000)] = 8
    epoch: int = 0
    started_from: Word = ""  # the file's name, 'imagenet' or 'random'
    started_sha256: Word = ""
    licence: Word = ""  # of the initial weights
    labels_sha256: Word = ""  # of videos, patients, folds and labels
    videos_sha256: Word = ""  # of the digests of their decoded frames
    left_out: int = 0  # val and test videos that the initial weights were trained on
    settings: dict[str, str | int | float | bool | list[str]] = Field({})

    @model_validator(mode="after")
    def check_names(self):
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"two tasks have the same name: {', '.join(sorted(names))[:200]}")
        return self

    @property
    def is_panecho(self):
        """Whether the encoder has PanEcho's architecture, which extraction requires."""
        built = self.model_name, self.arch, self.layers, self.heads, self.normalization
        return built == ("frame_transformer", "convnext_tiny", 4, 8, "imagenet")

    def to_save(self):
        """The record as plain Python values."""
        return self.model_dump(by_alias=True)


def read_tasks(path):
    """A JSON list of tasks -> entries like those of `panecho.TASKS`. Raises UserError."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the task list {path} as JSON: {error}") from error
    record = raw if isinstance(raw, dict) else {"tasks": raw}
    tasks = validate_as(EncoderRecord, record, str(path)).tasks
    if not tasks:
        raise UserError(f"{path} has no task; a task has a name, a type, and classes or a unit")
    return [task.entry() for task in tasks]


def record_of(saved, path):
    """The EncoderRecord in the dict of a weights file; None in published files."""
    if "encoder" not in saved:
        return None
    return validate_as(EncoderRecord, saved["encoder"], f"the record in {path}")
