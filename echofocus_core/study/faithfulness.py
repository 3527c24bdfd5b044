"""Tests of an attribution: answers when videos are removed in its order, and the importance of
each view."""

from contextlib import suppress

import numpy as np
import pandas as pd

from echofocus_core.base.console import UserError, progress, some
from echofocus_core.base.figures import OKABE_ITO, new_figure, save_figure
from echofocus_core.base.files import derive_seed, write_table
from echofocus_core.base.tables import clean_ids, read_table
from echofocus_core.study.attribution import as_tokens, outputs_of
from echofocus_core.study.scaling import scale
from echofocus_core.study.statistics import mean_interval
from echofocus_core.video.store import UnreadableStudy

GRID = np.linspace(0, 1, 11)  # shares of a study's videos
RANDOM_ORDERS = 5


# ------------------------------------------------------------------------------------------- curves


def study_curves(model, bag, explanation, truths, settings):
    """Curves of one study: dict of (label number, kind, order) to quality at GRID.

    Deletion removes first the videos that support the truth most; insertion restores them first
    (Petsiuk, Das and Saenko, "RISE", BMVC 2018); 'random' is the mean over several random orders.
    The quality of an answer is the probability of the truth. For a measurement it is minus the
    error in standard deviations, and videos are ordered by absolute score. truths: (T,),
    normalised.
    """
    V, C, _ = bag.embeddings.shape
    tokens = as_tokens(model.net, bag.embeddings).unflatten(0, (V, C))
    counts = np.unique(np.round(1 + GRID * (V - 1)).astype(int))  # videos kept, at least one

    def answers_along(order):
        """Answers (K, T) with the first 1, ..., V videos of an order."""
        bags = [tokens[np.sort(order[:n])].flatten(0, 1) for n in counts]
        together = max(1, settings.batch_tokens // (V * C))
        parts = [
            outputs_of(model.net, bags[k : k + together], settings).cpu().numpy()
            for k in range(0, len(bags), together)
        ]
        return model.readable(np.concatenate(parts))

    def curve(answers, i):
        label = model.outputs.names[i]
        if model.kind(label) == "binary":
            quality = np.abs(1 - truths[i] - answers[:, i])
        else:
            scaled = scale(answers[:, [i]], [label], model.scaling or {})[:, 0]
            quality = -np.abs(scaled - truths[i])
        return np.interp(1 + GRID * (V - 1), counts, quality)

    rng = np.random.default_rng(derive_seed("curves", explanation["eid"]))
    random_answers = [answers_along(rng.permutation(V)) for _ in range(RANDOM_ORDERS)]
    curves = {}
    for k, i in enumerate(explanation["columns"]):
        if np.isnan(truths[i]):
            continue
        scores = explanation["scores"][k].sum(1)
        support = support_of_truth(scores, truths[i], model.kind(model.outputs.names[i]), settings)
        order = np.argsort(-support, kind="stable")
        random = np.mean([curve(answers, i) for answers in random_answers], axis=0)
        curves[i, "insertion", "score"] = curve(answers_along(order), i)
        curves[i, "deletion", "score"] = curve(answers_along(order[::-1]), i)[::-1]
        curves[i, "insertion", "random"], curves[i, "deletion", "random"] = random, random[::-1]
    return curves


def support_of_truth(scores, truth, kind, settings):
    """Scores (V,) of videos -> how much each video supports the truth."""
    if settings.explain_mode == "loss":  # scores are contributions to the loss
        return -scores
    if kind != "binary" or settings.explain_method == "attention":  # the sign has no meaning
        return np.abs(scores)
    return scores * (2 * truth - 1)


def write_curves(model, store, explanations, targets, patients, settings, path):
    """Write tables and a figure of insertion and deletion next to `path` (without suffix).

    targets: study id -> (T,) normalised labels; patients: study id -> patient. Raises UserError.
    """
    by_key = {}
    for explanation in progress(explanations, desc="curves", unit="study"):
        if len(explanation.get("videos", ())) < 2 or not explanation["columns"]:
            continue
        eid = explanation["eid"]
        curves = study_curves(model, store.read(eid), explanation, targets[eid], settings)
        for key, curve in curves.items():
            by_key.setdefault(key, {})[eid] = curve
    if not by_key:
        raise UserError("--curves needs labelled studies with at least two videos")
    rows, areas = [], []
    for (i, kind, order), curves in by_key.items():
        table = pd.DataFrame(curves)  # (GRID, studies)
        part = {"label": model.outputs.names[i], "kind": kind}
        for share, quality in zip(GRID, table.mean(axis=1), strict=True):
            rows.append(part | {"order": order, "share": share, "quality": quality})
        if order == "random":
            continue
        area = np.trapezoid(table, GRID, axis=0)
        gain = area - np.trapezoid(pd.DataFrame(by_key[i, kind, "random"]), GRID, axis=0)
        low, high = interval_of(gain, table.columns, patients)
        areas.append(part | {
            "studies": len(area), "area": area.mean(), "against_random": gain.mean(),
            "against_random_low": low, "against_random_high": high,
        })  # fmt: skip
    rows, areas = pd.DataFrame(rows), pd.DataFrame(areas)
    write_table(rows, path.with_name(path.name + ".curves.csv"))
    write_table(areas, path.with_name(path.name + ".curve_areas.csv"))
    kinds = rows["label"].map(model.kind)  # the qualities of findings and measurements differ
    kind = "binary" if (kinds == "binary").any() else kinds.iloc[0]
    ylabel = "minus the error" + " [SD]" * bool(model.scaling)
    ylabel = "probability of the truth" if kind == "binary" else ylabel
    plot_curves(rows[kinds == kind], ylabel, path.with_name(path.name + ".curves"))
    return areas


def interval_of(values, eids, patients):
    """95 % interval of the mean of values (S,) of studies, over their patients."""
    return mean_interval(np.asarray(values), [str(patients.get(eid, eid)) for eid in eids])


def plot_curves(rows, ylabel, path):
    """Plot mean curves over all labels: deletion and insertion, by score and in random order."""
    figure, axes = new_figure(1, 2, figsize=(8, 3.6), layout="constrained", sharey=True)
    for axis, kind, action in zip(
        axes, ("deletion", "insertion"), ("removed", "restored"), strict=True
    ):
        part = rows[rows["kind"] == kind].groupby(["order", "share"])["quality"].mean()
        for order, style, colour in (("score", "-", OKABE_ITO[0]), ("random", "--", OKABE_ITO[1])):
            axis.plot(GRID, part[order], style, color=colour, label=f"{order} order")
        axis.set(xlabel=f"share of videos {action}", ylabel=ylabel, title=kind)
        axis.legend()
    save_figure(figure, path)


# -------------------------------------------------------------------------------------------- views


def read_views(path, listener, store, eids):
    """(eid, video) -> view for these studies, from a table with these columns. Raises UserError,
    also if the table has none of their videos."""
    table = read_table(path, listener, "table of views")
    absent = [name for name in ("eid", "video", "view") if name not in table]
    if absent:
        raise UserError(f"{path} has no column {', '.join(absent)} (it has: {some(table.columns)})")
    rows = table[["eid", "video", "view"]].dropna().apply(lambda x: x.str.strip())
    rows["eid"] = clean_ids(rows["eid"], path, listener)
    rows = rows.drop_duplicates()
    repeated = rows[rows.duplicated(["eid", "video"])]
    if len(repeated):
        listener.error(
            f"{path}: {len(repeated)} videos have two views: {some(repeated['video'])}",
            "keep one row for each video",
        )
    explained = rows[rows["eid"].isin(eids)]
    if n := len(rows) - len(explained):
        listener.note(f"{path}: {n} rows are for studies that are not explained")
    views = explained.set_index(["eid", "video"])["view"].to_dict()
    for encoder in filter(None, store.parts):
        views |= {(eid, f"{encoder}/{video}"): view for (eid, video), view in views.items()}
    for eid in explained["eid"].unique():
        with suppress(UnreadableStudy):
            if any((eid, name) in views for name in store.read(eid).videos):
                return views
    raise UserError(f"{path} has no video of these studies; check its columns eid and video")


def write_views(videos, views, patients, path):
    """Write the importance of each view, by label: a table and a figure next to `path`.

    videos: rows of the long table. The `share` of a view is the share of its videos in a study's
    summed absolute scores; `per_video` divides it by its share of the study's videos, so that 1 is
    average. Intervals are over patients.
    """
    names = zip(videos["eid"], videos["video"], strict=True)
    rows = videos.assign(view=[views.get(name) for name in names])
    if n := len(rows.loc[rows["view"].isna(), ["eid", "video"]].drop_duplicates()):
        print(f"{n} videos are not in the table of views and count as 'unknown'")
    if n := int(rows["score"].isna().sum()):
        print(f"{n} blank scores (studies with one video) are ignored")
    rows = rows.dropna(subset=["score"]).fillna({"view": "unknown"})
    rows["size"] = rows["score"].abs()
    sizes = rows.groupby(["label", "eid"])["size"]
    rows["share"] = rows["size"] / sizes.transform("sum").clip(lower=1e-30)
    rows["part"] = 1 / sizes.transform("size")
    table = []
    for (label, view), part in rows.groupby(["label", "view"]):
        sums = part.groupby("eid")[["share", "part"]].sum()
        per_video = sums["share"] / sums["part"]
        low, high = interval_of(per_video, sums.index, patients)
        table.append({
            "label": label, "view": view, "studies": len(sums), "videos": len(part),
            "share": sums["share"].mean(), "per_video": per_video.mean(),
            "per_video_low": low, "per_video_high": high, "score": part["score"].mean(),
        })  # fmt: skip
    table = pd.DataFrame(table)
    write_table(table, path.with_name(path.name + ".views.csv"))
    plot_views(table, path.with_name(path.name + ".views"))
    return table


def plot_views(table, path):
    """Plot the importance of a video of each view: a point per label; an interval for one label."""
    order = table.groupby("view")["per_video"].mean().sort_values().index
    figure, axis = new_figure(figsize=(6, 1.2 + 0.35 * len(order)), layout="constrained")
    for y, view in enumerate(order):
        part = table[table["view"] == view]
        axis.plot(part["per_video"], [y] * len(part), "o", color=OKABE_ITO[0], alpha=0.6)
        if table["label"].nunique() == 1:
            ends = part.iloc[0][["per_video_low", "per_video_high"]].to_numpy(float)
            axis.plot(ends, [y, y], color=OKABE_ITO[0])
    axis.axvline(1, color="grey", lw=0.8)
    axis.set_yticks(range(len(order)), order)
    axis.set(xlabel="importance per video (absolute scores; 1 is average)")
    save_figure(figure, path)
