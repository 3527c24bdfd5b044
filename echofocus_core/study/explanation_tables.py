"""Tables and files of explanations, see `attribution.explain_study`."""

import h5py
import numpy as np
import pandas as pd

from echofocus_core.base.console import RUN, UserError, some
from echofocus_core.base.files import atomic_path, in_file_name, sha256_of, write_table
from echofocus_core.base.hdf5 import new_hdf5
from echofocus_core.base.options import Settings
from echofocus_core.study.attribution import COMPLETE
from echofocus_core.study.explanations import label_explanation
from echofocus_core.study.loop import report_unreadable


def video_rows(model, explanation, settings):
    """DataFrame with a row per label and video, largest absolute score first.

    Columns: eid, label, prediction, video, score (signed; its unit in `score_unit`), score_abs,
    rank, without (the answer without the video), baseline (the answer from which scores start;
    `baseline_name` describes it), score_warning (why the scores have no meaning, or ''),
    convergence_error; by shapley also standard_error (of the score).
    """
    parts, videos = [], np.array(explanation["videos"], object)
    for k in range(len(explanation["columns"])):
        x = label_explanation(model, explanation, k, settings)
        order = np.argsort(-explanation["absolute"][k], kind="stable")
        columns = {
            "eid": explanation["eid"], "label": x.label, "prediction": x.answer,
            "video": videos[order], "score": x.scores[order], "score_abs": x.absolute[order],
            "rank": np.arange(1, len(order) + 1), "without": x.without[order],
            "baseline": x.baseline, "baseline_name": x.baseline_name,
            "convergence_error": x.error, "score_unit": x.unit, "score_warning": x.fault,
        }  # fmt: skip
        if settings.explain_method == "shapley":
            columns["standard_error"] = x.standard_error[order]
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def labelled_rows(model, explanation, settings, truths):
    """`video_rows` with the study's label as `y_true`, if any study has one.

    truths: DataFrame of labels by study id, in physical units.
    """
    rows = video_rows(model, explanation, settings)
    if truths.notna().any(axis=None):
        rows.insert(2, "y_true", rows["label"].map(truths.loc[explanation["eid"]]))
    return rows


def top_rows(model, explanation, settings, truths, dataset):
    """Rows of the published table: one per label, with the top videos by absolute score."""
    values, rows = model.readable(explanation["answer"])[0], []
    for k, i in enumerate(explanation["columns"]):
        absolute, videos = explanation["absolute"][k], explanation["videos"]
        loss = np.nan if np.isnan(explanation["truths"][i]) else explanation["losses"][i]
        row = {
            "echo_id": explanation["eid"], "measure": model.outputs.names[i],
            "y_true": truths[i], "y_pred": values[i], "loss": loss,
        }  # fmt: skip
        best = [(videos[v], absolute[v]) for v in np.argsort(-absolute, kind="stable")]
        best += [("", np.nan)] * settings.explain_n  # blank if a study has fewer videos
        for n, (video, score) in enumerate(best[: settings.explain_n], start=1):
            row |= {f"top_video_{n}": video, f"top_video_{n}_score": score}
        rows.append(row | {"dataset": dataset})
    return rows


def write_explanations(job, explanations, truths, names, warnings):
    """Write the long table, the published table and the scores of clips.

    warnings: why answers are doubtful, text -> studies; a column of the long table, if any.
    Returns the long table.
    """
    model, settings, dataset = job.model, job.settings, job.settings.dataset
    videos, tops, unreadable, folder = [], [], {}, model.folder
    with atomic_path(folder / names["clips"]) as temporary, new_hdf5(temporary) as f:
        f.attrs["method"], f.attrs["model_name"] = settings.explain_method, folder.name
        for explanation in explanations:
            if "unreadable" in explanation:
                unreadable[explanation["eid"]] = explanation["unreadable"]
            if not explanation["columns"]:
                continue
            truth = truths.loc[explanation["eid"]].to_numpy()
            videos.append(labelled_rows(model, explanation, settings, truths))
            tops += top_rows(model, explanation, settings, truth, dataset)
            labels = [model.outputs.names[i] for i in explanation["columns"]]
            f[f"{explanation['eid']}/scores"] = explanation["scores"]  # (T, V, C)
            for name, texts in (("labels", labels), ("videos", explanation["videos"])):
                f[explanation["eid"]].create_dataset(name, data=texts, dtype=h5py.string_dtype())
        report_unreadable(unreadable)
        if not videos:
            raise UserError("no study could be explained")
    videos = pd.concat(videos, ignore_index=True)
    if warnings:
        of_study = {
            eid: "; ".join(text for text, eids in warnings.items() if eid in eids)
            for eid in videos["eid"].unique()
        }
        videos["warning"] = videos["eid"].map(of_study)
    write_table(videos, folder / names["videos"])
    write_table(pd.DataFrame(tops), folder / names["tops"])
    worst = videos["convergence_error"].max()
    if worst >= COMPLETE:
        RUN.warning(
            f"the sum of the scores differs from the change of the answer by up to {worst:.1%} of "
            "the summed absolute scores",
            "see the column convergence_error",
        )
    if faulty := some(videos["label"][videos["score_warning"] != ""].unique()):
        RUN.warning(
            f"{faulty}: scores start from an answer that no training study has",
            "use --explain_method shapley",
        )
    for name in names.values():
        print(f"wrote {folder / name}")
    return videos


def explanation_names(model, settings, columns, eids):
    """File names with all selected options, so that other selections do not overwrite them."""
    labels, selection = model.outputs.names, [f"explanation_{settings.subset}_{settings.dataset}"]
    if settings.eids or settings.select != "all":
        studies = "eids" if settings.eids else settings.select
        selection.append(f"{studies}-{sha256_of(*eids)[:8]}")
    if len(columns) < len(labels):
        selection.append("labels-" + in_file_name("_".join(labels[i] for i in columns)))
    if settings.sample_limit and settings.select == "all":
        selection.append(f"sample_limit-{settings.sample_limit}")
    mode, method = [f"mode-{settings.explain_mode}"], []
    if settings.explain_method != "adaptive":
        method.append(settings.explain_method)
    if settings.explain_steps != Settings().explain_steps:
        method.append(f"steps-{settings.explain_steps}")
    if settings.baseline != "zero":
        method.append(f"baseline-{settings.baseline}")
    tops = ".".join([*selection, f"explain_n-{settings.explain_n}", *mode, *method])
    long = ".".join([*selection, *(mode if settings.explain_mode != "pred" else []), *method])
    return {"videos": f"{long}.csv", "tops": f"{tops}.csv", "clips": f"{long}.clips.h5"}
