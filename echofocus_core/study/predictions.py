"""The table of answers, a row a study, and the studies that have none."""

import numpy as np
import pandas as pd

from echofocus_core.base.files import begins, output_path, refuse_others, write_table

PAGE = r"<!doctype html>\s+<html lang=.en.>\s+<head>[\s\S]*\"page\.css\""  # of report/templates


def prediction_table(model, found, told, reach=None, years=()):
    """A row a study: ids and counts, a column an output (with its unit) and its range, the most
    probable class, the probability of survival to some `years`, decisions and the thresholds they
    were taken at, novelty, warnings. Returns the table, and why studies are not in it.

    told: the studies' InputFound; reach: see `trust.reach_of`. A study without one finite
    answer is not in the table; labels never learnt are blank, and a single answer that
    is no number is blank with a warning.
    """
    values = model.readable(found.logits)
    values[~np.isfinite(values)] = np.nan
    blank = np.isnan(values)
    learnt = ~np.isin(model.labels, model.record.unlearnt)
    lost = blank[:, learnt].all(axis=1)
    left_out = {found.eids[i]: "the model gives no number" for i in np.flatnonzero(lost)}
    table = {"eid": found.eids, "n_videos": found.n_videos, "n_clips": found.n_clips}
    parts = {"": values}
    if reach is not None:
        outputs = model.for_range(found.logits)
        parts["_low"], parts["_high"] = map(model.from_range, (outputs - reach, outputs + reach))
    for i, label in enumerate(model.labels):
        unit = f" [{model.unit(label)}]" if model.unit(label) else ""
        table |= {f"{label}{end}{unit}": part[:, i] for end, part in parts.items()}
    if hasattr(model, "spread"):  # several that are averaged
        spread = np.where(blank, np.nan, model.spread(found.logits).reshape(values.shape))
        table |= {f"{label}_sd": x for label, x in zip(model.labels, spread.T, strict=True)}
    for label in model.outputs.of_kind("multiclass"):
        names, own = np.array(model.outputs.classes[label]), values[:, model.outputs.slices[label]]
        known = ~np.isnan(own).any(axis=1)
        table[label] = np.where(known, names[np.where(known[:, None], own, 0).argmax(axis=1)], "")
    table |= model.survival(found.logits, years)
    shape = len(values), found.logits.shape[1] // len(model.labels), len(model.labels)
    given = np.isfinite(found.logits).reshape(shape).any(axis=1)
    for label, threshold in model.record.thresholds.items():
        column = values[:, model.labels.index(label)]
        decided = np.where(np.isnan(column), np.nan, column >= threshold)
        table[f"{label}_decision"] = pd.array(decided, dtype="Int64")
        table[f"{label}_threshold"] = threshold
    if told.novelty:
        table["novelty"] = [told.novelty.get(eid, np.nan) for eid in found.eids]
    warnings = [[told.warnings.get(eid), told.notes.get(eid)] for eid in found.eids]
    for i in np.flatnonzero((blank & learnt).any(axis=1) & ~lost):
        past = blank[i] & learnt & given[i]
        for which, text in (
            (past, "past the end of the Box-Cox scale"),
            (blank[i] & learnt & ~past, "no number"),
        ):
            names = [label for label, no in zip(model.labels, which, strict=True) if no]
            warnings[i].append(names and f"{', '.join(names)}: {text}")
    table["warning"] = ["; ".join(filter(None, texts)) for texts in warnings]
    return pd.DataFrame(table)[~lost].reset_index(drop=True), left_out


def refuse_other_tables(typed):
    """UserError, before any work, for an --out that would replace what `predict` did not write."""
    path = output_path(typed["out"], "--out", "table of predictions", begins("eid,n_videos,n_"))
    beside = f"--out {path}:"
    refuse_others(left_out_path(path), "list of studies left out", begins("eid,reason\\s"), beside)
    if typed.get("page"):
        refuse_others(page_folder(path) / "index.html", "page of predictions", begins(PAGE), beside)


def left_out_path(path):
    return path.with_name(f"{path.stem}_left_out.csv")


def page_folder(path):
    return path.with_name(f"{path.stem}_page")


def report_left_out(left_out, path):
    """Studies without a prediction and why: on screen, and in a table beside the predictions'."""
    table = left_out_path(path)
    table.unlink(missing_ok=True)
    if left_out:
        print(f"{len(left_out)} studies left out, listed in {table}:")
        for eid, reason in list(left_out.items())[:10]:
            print(f"  {eid}: {reason}")
        write_table(pd.DataFrame(left_out.items(), columns=["eid", "reason"]), table)
