"""Describe a model as text or JSON: architecture, labels, history, settings, origin."""

from pathlib import Path

import numpy as np
import pandas as pd

from echofocus_core.base import checkpoints, releases
from echofocus_core.base.console import UserError, printable
from echofocus_core.base.files import sha256_file
from echofocus_core.study.config import MISSING_LABELS
from echofocus_core.study.loading import (
    encoder_in,
    find_model,
    is_encoder,
    labels_for,
    outputs_from,
    read_checkpoint,
    read_network,
)
from echofocus_core.study.outputs import Outputs
from echofocus_core.video.encoders.trained import load_trained

SHOWN_ELSEWHERE = (
    "labels", "units", "unlearnt", "thresholds", "task", "type", "settings", "input",
    "loss_over_all_labels",
)  # fmt: skip


def describe_model(net, saved, record, outputs, units, scaling):
    """Describe a study-level model, as a dict. record: of its training; saved: its checkpoint.

    outputs: see `study.outputs`; scaling: measurement to shift, mean, stdev (and lmbda).
    """
    architecture = net.architecture | {"parameters": count(net)}
    facts = record | record.get("settings", {})
    shown = (*SHOWN_ELSEWHERE, *architecture)
    return {
        "kind": "study-level model",
        "architecture": architecture,
        "type": outputs.type,
        "labels": [
            describe_label(name, "" if kind == "survival" else units, scaling or {}, record)
            | ({"kind": kind} if outputs.type == "mixed" else {})
            for name, kind in outputs.kind_of.items()
        ],
        "history": describe_history(saved.get("perf_log")),
        "input": record.get("input", {}),
        "settings": {k: v for k, v in facts.items() if k not in shown and v not in ("", [], {})},
    }


def count(net):
    return sum(p.numel() for p in net.parameters())


def describe_label(label, units, scaling, record):
    row = {"label": label, "unit": dict(units).get(label, "")}
    names = ("shift", "lmbda", "mean", "stdev")
    row |= {k: float(v) for k, v in scaling.get(label, {}).items() if k in names}
    if label in record.get("thresholds", {}):
        row["threshold"] = record["thresholds"][label]
    if label in record.get("unlearnt", []):
        row["note"] = "not learnt"
    return row


def describe_history(rows):
    """Epochs, and the lowest validation loss with its epoch, from a perf_log; {} if missing."""
    try:
        losses = [(float(row[2]), int(row[0])) for row in rows]
        best, epoch = min((loss, epoch) for loss, epoch in losses if np.isfinite(loss))
    except (TypeError, ValueError, IndexError, KeyError, OverflowError):
        return {}
    return {"epochs": len(losses), "best_validation_loss": best, "best_epoch": epoch}


def print_description(description):
    """Print one line per fact, and the labels as a table."""
    for key, value in description.items():
        if key == "labels":
            print(f"labels: {len(value) or 'none'}")
            if value:
                table = pd.DataFrame(value).dropna(axis=1, how="all")
                print(table.to_string(index=False, na_rep=""))
        elif isinstance(value, dict):
            facts = ", ".join(f"{k} {v}" for k, v in value.items())
            print(f"{key}: {printable(facts) or 'none'}")
        else:
            print(f"{key}: {printable(value)}")


def describe_file(name, tasks):
    """Describe the checkpoint or encoder of a model name, folder or .pt path, as a dict."""
    path = find_model_file(name)
    releases.check_source(path)
    if is_encoder(checkpoints.load_safely(path)):
        encoder = load_trained(path).model
        facts = {
            "kind": "PanEcho video encoder",
            "architecture": {"parameters": count(encoder)},
            "labels": [
                {
                    "label": x["name"],
                    "type": x["type"],
                    "classes": ", ".join(x["class_names"] or []),
                }
                for x in encoder.tasks
            ],
        }
    else:
        facts = model_facts(path, tasks)
    facts = {"name": path.parent.resolve().name, "file": path.name} | facts
    facts |= {"sha256": sha256_file(path), "source": origin_of(path.parent)}
    files = sorted(path.parent.iterdir()) if path.name in releases.CHECKPOINTS else [path]
    return facts | {"files": {p.name: p.stat().st_size for p in files if p.is_file()}}


def find_model_file(name):
    """The checkpoint or encoder file of a model name, folder or .pt path; '' is the only one."""
    if Path(name).suffix == ".pt" and Path(name).is_file():
        return Path(name)
    folder = find_model(name)
    path = folder / "best_checkpoint.pt"
    return path if path.is_file() else encoder_in(folder) or path


def origin_of(folder):
    """The source, licence and citation of a model, from its record; {} for one's own."""
    source = releases.read_source(folder)
    if not source and releases.registry_entry(folder):  # only its folder has the release's name
        return releases.rights({})
    return {k: v for k, v in source.items() if k != "files"}


def model_facts(path, tasks):
    """The facts in a checkpoint; labels without a name are numbered."""
    saved = read_checkpoint(path)
    record, net = read_network(saved, path)
    facts = {}
    try:
        task, labels, units, origin = labels_for(path.parent, record, net.n_outputs, tasks)
        outputs, scaling = outputs_from(saved, record, labels, path)
    except UserError as error:
        task, units, origin, scaling = "", {}, "nobody", None
        labels = [f"output {i + 1}" for i in range(net.n_outputs)]
        facts["labels_missing"] = str(error)
        outputs = Outputs.of(labels, "regression" if saved.get("input_norm_dict") else "binary")
    facts |= {"task": task, "labels_from": origin}
    if record and record.biased_if_missing:
        facts["note"] = f"if its training table had missing labels: {MISSING_LABELS}"
    return facts | describe_model(
        net, saved, record.to_save() if record else {}, outputs, units, scaling
    )
