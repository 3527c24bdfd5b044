"""What an encoder says of itself: its tasks, and how it was trained; read without trust."""

import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from echofocus_core.base.console import UserError
from echofocus_core.base.options import Entry, Text, readable_text, validated

KINDS = {
    "binary": "binary_classification",
    "multi-class": "multi-class_classification",
    "regression": "regression",
}


def task_name(name):
    """Refuse a name that could not be a module's or a folder's."""
    if not re.fullmatch(r"[A-Za-z0-9_|() -]{1,100}", name) or name != name.strip():
        raise ValueError(f"{ascii(name)[:60]} is no name of a task: letters, digits, - _ | ( )")
    return name


Word = Annotated[str, AfterValidator(lambda text: text and readable_text(text))]  # or nothing


class EncoderTask(Entry):
    """One head: a name, what it tells, and its classes in output order or its unit."""

    name: Annotated[str, AfterValidator(task_name)]
    type: Literal[(*KINDS, *KINDS.values())]
    classes: list[Text] = Field([], alias="class_names")
    unit: Word = ""
    mean: float = 0.0  # over the training labels

    @model_validator(mode="before")
    @classmethod
    def either_word(cls, values):
        if isinstance(values, dict) and "classes" in values:
            values = values | {"class_names": values["classes"]}
            del values["classes"]
        return values

    @model_validator(mode="after")
    def agree(self):
        n, kind = len(self.classes), self.type.split("_")[0]
        if len({c.lower() for c in self.classes}) < n:
            raise ValueError(f"{self.name}: a class stands twice")
        if kind == "binary" and n not in (0, 2):
            raise ValueError(f"{self.name}: a binary task has two classes (no, yes), not {n}")
        if kind == "multi-class" and n < 3:
            raise ValueError(f"{self.name}: a multi-class task has three classes or more, not {n}")
        if kind == "regression" and n:
            raise ValueError(f"{self.name}: a regression has a unit and no classes")
        return self

    def entry(self):
        """As an entry of `panecho.TASKS`."""
        kind = KINDS.get(self.type, self.type)
        classes = self.classes or (["0.0", "1.0"] if kind.startswith("binary") else [])
        entry = {"name": self.name, "type": kind, "class_names": classes, "mean": self.mean}
        if kind == "regression":
            entry["unit"] = self.unit
        return entry


class TaskList(Entry):
    tasks: Annotated[list[EncoderTask], Field(max_length=1000)]

    @model_validator(mode="after")
    def once(self):
        names = [task.name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the task {name} stands twice")
        return self


def read_tasks(path):
    """A task list of one's own, JSON -> entries like those of `panecho.TASKS`. UserError."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"no task list {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    listed = validated(TaskList, raw if isinstance(raw, dict) else {"tasks": raw}, str(path))
    if not listed.tasks:
        raise UserError(f"{path} names no task; each has a name, type, and classes or a unit")
    return [task.entry() for task in listed.tasks]


class EncoderRecord(TaskList):
    """The `encoder` entry of weights that `embed/train.py` wrote."""

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
    licence: Word = ""  # of what it started from
    labels_sha256: Word = ""  # of videos, patients, folds and labels
    videos_sha256: Word = ""  # of the checksums of their decoded frames
    left_out: int = 0  # videos of val and test that what it started from has seen
    settings: dict[str, str | int | float | bool | list[str]] = Field({})

    @property
    def is_panecho(self):
        """Whether it is PanEcho's architecture, which extraction takes."""
        built = self.model_name, self.arch, self.layers, self.heads, self.normalization
        return built == ("frame_transformer", "convnext_tiny", 4, 8, "imagenet")

    def to_save(self):
        """As plain Python values."""
        saved = self.model_dump(exclude={"tasks"})
        return saved | {"tasks": [task.model_dump(by_alias=True) for task in self.tasks]}


def record_of(saved, path):
    """The EncoderRecord in a weights file's dict; None in a published one. UserError."""
    if "encoder" not in saved:
        return None
    return validated(EncoderRecord, saved["encoder"], f"{path}, its record")
