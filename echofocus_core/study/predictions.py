"""The table of a model's answers, one row per study: probabilities or values, ranges, warnings."""

from itertools import chain

import numpy as np
import pandas as pd

from echofocus_core.base.console import RUN, UserError, count_of, reason_lines
from echofocus_core.base.files import begins, output_path, write_table
from echofocus_core.study.input_check import (
    BETWEEN_CLASSES,
    InputCheck,
    Jackknife,
    interval_half_width,
)
from echofocus_core.study.loop import LoopContext, merge_results, predict_steps, run_studies
from echofocus_core.study.models import IMPLAUSIBLE
from echofocus_core.study.network import Readings


def answer_studies(model, store, eids, settings):
    """(table, why the others have no answer, warnings) of studies, see `prediction_table`."""
    check = InputCheck(model.record.inputs, model.novelty)
    steps, ranges, unreadable = [], {}, {}
    context = LoopContext(model.net, store, settings, unreadable=unreadable, look=check)
    for results in predict_steps(context, eids, "predict"):
        steps.append(results)
        half_widths = half_widths_of(model, store, results, settings, check.report)
        if half_widths is not None:
            ranges |= dict(zip(results.eids, half_widths, strict=True))
    results = merge_results(steps, eids, context)
    note_cut_studies(store, results, check.report)
    half_widths = np.array([ranges[eid] for eid in results.eids]) if ranges else None
    table, no_number = prediction_table(model, results, check.report, half_widths, settings.years)
    return table, unreadable | no_number, check.report.warnings


def half_widths_of(model, store, results, settings, input_report):
    """`interval_half_width` (S, T) of Results's answers, in `model.range_values`; or None."""
    unit = settings.spread or ("clips" if settings.page else "none")
    if unit == "none" or isinstance(model.net, Readings) or not len(results):
        return None
    jackknife = Jackknife(store, unit)
    sizes = zip(results.eids, results.n_videos, results.n_clips, strict=True)
    keys = {eid: jackknife.keys(eid, videos, n // videos) for eid, videos, n in sizes}
    left_out = run_studies(model.net, jackknife, list(chain(*keys.values())), settings)
    values = dict(zip(left_out.eids, model.range_values(left_out.logits), strict=True))
    half_widths = np.full((len(results), len(model.outputs.names)), np.nan)
    blank = half_widths[0].copy()  # a file was deleted in the meantime
    for i, (videos, n) in enumerate(zip(results.n_videos, results.n_clips, strict=True)):
        if of_study := keys[results.eids[i]]:  # not one clip, or one video
            shape = *jackknife.assignments(videos, n // videos), len(blank)
            answers = np.reshape([values.get(key, blank) for key in of_study], shape)
            modulo = unit == "clips" and input_report.modulo[results.eids[i]]
            between = BETWEEN_CLASSES * n / videos if modulo else 0
            half_widths[i] = interval_half_width(answers, videos, between)
    return half_widths


def note_cut_studies(store, results, input_report):
    """Note in an InputReport the studies of which `--max_videos_per_study` left videos out."""
    if getattr(store, "most_videos", 0):
        for eid, n in zip(results.eids, results.n_videos, strict=True):
            if n < (whole := store.header(eid).videos):
                note = f"from {n} of its {whole} videos (--max_videos_per_study)"
                notes = filter(None, [input_report.notes.get(eid), note])
                input_report.notes[eid] = "; ".join(notes)


def survival_columns(model, logits, years):
    """`LoadedModel.survival`. Raises UserError where it is 1 or 0 for all studies at all times."""
    table = model.survival(logits, years)
    for label in model.outputs.of_kind("survival"):
        columns = {k: v for k, v in table.items() if k.startswith(f"{label}_survival_")}
        values, unit = np.concatenate([[], *columns.values()]), model.units.get(label, "")
        if not unit and len(values):
            RUN.warning(f"the times of {label} have no unit: years are assumed")
        if len(values) and (np.all(values > 1 - 1e-6) or np.all(values < 1e-6)):
            raise UserError(
                f"{', '.join(columns)} is {values[0]:.0f} for all studies; ask for other --years, "
                f"or correct the unit of {label} ({unit or 'years, assumed'}) and train again"
            )
    return table


def prediction_table(model, results, input_report, half_widths=None, years=()):
    """(DataFrame with one row per study, why other studies are not in it).

    Columns: ids and counts, one per output (with its unit) and its range, the most probable class,
    the probability of survival to some `years`, decisions and their thresholds, novelty, warnings.
    input_report: the studies' InputReport; half_widths: see `half_widths_of`. A study without one
    finite answer is not in the table; labels never learnt are blank, and a single answer that is
    not a number is blank with a warning.
    """
    values = model.readable(results.logits)
    values = np.where(np.isfinite(values), values, np.nan)
    learnt = ~np.isin(model.outputs.names, model.record.unlearnt)
    lost = np.isnan(values)[:, learnt].all(axis=1)
    left_out = {results.eids[i]: "the model gives no number" for i in np.flatnonzero(lost)}
    table = {"eid": results.eids, "n_videos": results.n_videos, "n_clips": results.n_clips}
    parts = {"": values}
    if half_widths is not None:
        middle, answers = model.range_values(results.logits), model.from_range_values
        parts |= {"_low": answers(middle - half_widths), "_high": answers(middle + half_widths)}
    for i, label in enumerate(model.outputs.names):
        unit = f" [{model.unit(label)}]" if model.unit(label) else ""
        table |= {f"{label}{end}{unit}": part[:, i] for end, part in parts.items()}
    table |= model.member_columns(results.logits, values)
    for label in model.outputs.each:
        table |= label.answer_columns(values[:, model.outputs.slices[label.name]])
    table |= survival_columns(model, results.logits, years)
    table |= decisions_of(model, values)
    if input_report.novelty:
        table["novelty"] = [input_report.novelty.get(eid, np.nan) for eid in results.eids]
    table["warning"] = warnings_of(model, results, input_report, np.isnan(values) & learnt)
    return pd.DataFrame(table)[~lost].reset_index(drop=True), left_out


def decisions_of(model, values):
    """label_decision -> 1 or 0, blank without an answer; label_threshold -> its threshold."""
    columns = {}
    for label, threshold in model.record.thresholds.items():
        column = values[:, model.outputs.names.index(label)]
        decided = np.where(np.isnan(column), np.nan, column >= threshold)
        columns[f"{label}_decision"] = pd.array(decided, dtype="Int64")
        columns[f"{label}_threshold"] = threshold
    return columns


def warnings_of(model, results, input_report, blank):
    """The warning of each study, in words. blank (S, T): answers of learnt labels that are NaN."""
    n_outputs = len(model.outputs.names)
    shape = len(blank), results.logits.shape[1] // n_outputs, n_outputs
    finite = np.isfinite(results.logits).reshape(shape).any(axis=1)  # of some averaged model
    far = model.implausible(results.logits)
    texts = []
    for i, eid in enumerate(results.eids):
        parts = [input_report.warnings.get(eid), input_report.notes.get(eid)]
        for which, text in (
            (blank[i] & finite[i], "past the end of the Box-Cox scale"),
            (blank[i] & ~finite[i], "no number"),
            (far[i], IMPLAUSIBLE),
        ):
            names = [label for label, no in zip(model.outputs.names, which, strict=True) if no]
            parts.append(f"{', '.join(names)}: {text}" if names else "")
        texts.append("; ".join(filter(None, parts)))
    return texts


def left_out_path(path):
    return path.with_name(f"{path.stem}_left_out.csv")


def page_folder(path):
    return path.with_name(f"{path.stem}_page")


def report_left_out(left_out, path):
    """Print studies without a prediction and why, and write them next to the predictions."""
    table, left_out = left_out_path(path), dict(sorted(left_out.items()))
    table.unlink(missing_ok=True)
    if left_out:
        RUN.warning(
            f"{count_of(len(left_out), 'studies')} left out, listed in {table}:"
            f"{reason_lines(left_out)}"
        )
        write_table(pd.DataFrame(left_out.items(), columns=["eid", "reason"]), table)


PAGE = r"<!doctype html>\s+<html lang=.en.>\s+<head>[\s\S]*\"page\.css\""  # of report/templates


def refuse_other_tables(settings):
    """UserError, before any work, if --out is a file that `predict` did not write."""
    path = output_path(settings.out, "table of predictions", begins("eid,n_videos,n_"))
    output_path(left_out_path(path), "list of studies left out", begins("eid,reason\\s"))
    if path.suffix.lower() not in ("", ".csv"):
        raise UserError(f"--out {path}: predictions are written as CSV; name a .csv file")
    if settings.page:
        output_path(page_folder(path) / "index.html", "page of predictions", begins(PAGE))
