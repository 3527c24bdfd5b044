"""Does the attribution mean anything: what happens when videos go in its order, and which views
count."""

import numpy as np
import pandas as pd
import torch

from echofocus_core.base.console import UserError, progress, some
from echofocus_core.base.figures import OKABE_ITO, new_figure, save_figure
from echofocus_core.base.files import derive_seed, write_table
from echofocus_core.base.tables import clean_ids, read_table
from echofocus_core.study.attribution import device_of, outputs_of
from echofocus_core.video.store import UnreadableStudy

GRID = np.linspace(0, 1, 11)  # shares of a study's videos
RANDOM_ORDERS = 5
RESAMPLINGS = 1000  # of patients, for intervals


# ------------------------------------------------------------------------------------------- curves


def study_curves(model, bag, unit, truths, settings):
    """Curves of one study: dict of (label number, kind, order) to quality at GRID.

    Deletion takes away the videos that speak most for the truth first, insertion gives them back
    first (Petsiuk, Das and Saenko, "RISE", BMVC 2018); 'random' orders are the mean of a few. The
    quality of an answer is the probability of the truth or, of a measurement, minus its error in
    standard deviations, where videos go by the size of their score. truths: (T,), normalised.
    """
    net, V = model.net, len(bag.videos)
    tokens = torch.from_numpy(np.ascontiguousarray(bag.embeddings)).to(device_of(net))
    counts = np.unique(np.round(1 + GRID * (V - 1)).astype(int))  # videos kept; one at least

    def along(order):
        """Outputs (K, T) with the first 1, ..., V videos of an order."""
        kept = [tokens[np.sort(order[:n])].flatten(0, 1) for n in counts]
        parts, together = [], max(1, settings.batch_tokens // (V * tokens.shape[1]))
        for k in range(0, len(kept), together):
            parts.append(outputs_of(net, kept[k : k + together], settings).cpu().numpy())
        return np.concatenate(parts)

    def quality(outputs, i):
        if model.kind(model.labels[i]) == "binary":
            towards = outputs[:, i] * (2 * truths[i] - 1)
            return 1 / (1 + np.exp(-towards.astype(np.float64)))
        return -np.abs(outputs[:, i] - truths[i])

    def at_grid(values):
        return np.interp(1 + GRID * (V - 1), counts, values)

    rng = np.random.default_rng(derive_seed("curves", unit["eid"]))
    by_chance = [along(rng.permutation(V)) for _ in range(RANDOM_ORDERS)]
    found = {}
    for k, i in enumerate(unit["columns"]):
        if np.isnan(truths[i]):
            continue
        scores = unit["scores"][k].sum(1)
        key = towards_truth(scores, truths[i], model.kind(model.labels[i]), settings)
        first = np.argsort(-key, kind="stable")
        random = np.mean([at_grid(quality(outputs, i)) for outputs in by_chance], axis=0)
        found[i, "insertion", "score"] = at_grid(quality(along(first), i))
        found[i, "deletion", "score"] = at_grid(quality(along(first[::-1]), i))[::-1]
        found[i, "insertion", "random"], found[i, "deletion", "random"] = random, random[::-1]
    return found


def towards_truth(scores, truth, kind, settings):
    """Scores (V,) of videos -> how much each speaks for the truth, the most first."""
    if settings.explain_mode == "loss":  # of which a score is a part
        return -scores
    if kind != "binary" or settings.explain_method == "attention":  # without a sign that says it
        return np.abs(scores)
    return scores * (2 * truth - 1)


def write_curves(model, store, units, targets, patients, settings, path):
    """Tables and a figure of insertion and deletion, beside `path` (without ending).

    targets: study id -> (T,) normalised labels; patients: study id -> patient. Raises UserError.
    """
    curves, eids = {}, []
    for unit in progress(units, desc="curves", unit="study"):
        if len(unit.get("videos", ())) < 2 or not unit["columns"]:
            continue
        bag = store.read(unit["eid"])
        found = study_curves(model, bag, unit, targets[unit["eid"]], settings)
        for key, curve in found.items():
            curves.setdefault(key, {})[unit["eid"]] = curve
        eids += [unit["eid"]] if found else []
    if not eids:
        raise UserError("--curves needs labelled studies of two videos or more")
    rows, areas = [], []
    for (i, kind, order), of_study in curves.items():
        mean = np.mean(list(of_study.values()), axis=0)
        part = {"label": model.labels[i], "kind": kind, "order": order}
        rows += [part | {"share": s, "quality": q} for s, q in zip(GRID, mean, strict=True)]
        if order == "random":
            continue
        chance = curves[i, kind, "random"]
        own = {eid: np.trapezoid(c, GRID) for eid, c in of_study.items()}
        gain = {eid: own[eid] - np.trapezoid(chance[eid], GRID) for eid in own}
        low, high = interval_of(gain, patients)
        areas.append({
            "label": model.labels[i], "kind": kind, "studies": len(own),
            "area": np.mean(list(own.values())), "against_random": np.mean(list(gain.values())),
            "against_random_low": low, "against_random_high": high,
        })  # fmt: skip
    curves, areas = pd.DataFrame(rows), pd.DataFrame(areas)
    write_table(curves, path.with_name(path.name + ".curves.csv"))
    write_table(areas, path.with_name(path.name + ".curve_areas.csv"))
    kinds = curves["label"].map(model.kind)  # the qualities of findings and measurements differ
    kind = "binary" if (kinds == "binary").any() else kinds.iloc[0]
    plot_curves(
        curves[kinds == kind], kind, bool(model.scaling), path.with_name(path.name + ".curves")
    )
    return areas


def interval_of(values, patients):
    """95 % percentile interval of the mean of values (study id -> number), over patients."""
    groups = pd.Series(values).groupby(lambda eid: patients.get(eid, eid))
    sums, counts = groups.sum().to_numpy(), groups.size().to_numpy()
    if len(sums) < 2:
        return np.nan, np.nan
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(sums), size=(RESAMPLINGS, len(sums)))
    return tuple(np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975]))


def plot_curves(curves, kind_of_model, scaled, path):
    """Mean curves of all labels: deletion and insertion, by score and at random."""
    figure, axes = new_figure(1, 2, figsize=(8, 3.6), layout="constrained", sharey=True)
    ylabel = "probability of the truth" if kind_of_model == "binary" else "minus the error"
    ylabel += " [SD]" * (scaled and kind_of_model != "binary")
    for axis, kind in zip(axes, ("deletion", "insertion"), strict=True):
        part = curves[curves["kind"] == kind].groupby(["order", "share"])["quality"].mean()
        for (order, style), colour in zip(
            (("score", "-"), ("random", "--")), OKABE_ITO, strict=False
        ):
            axis.plot(GRID, part[order], style, color=colour, label=f"{order} order")
        done = "taken away" if kind == "deletion" else "given back"
        axis.set(xlabel=f"share of videos {done}", ylabel=ylabel, title=kind)
        axis.legend()
    save_figure(figure, path)


# -------------------------------------------------------------------------------------------- views


def read_views(path, listener, store, eids):
    """(eid, video) -> view, of a table with these columns; of these studies. Raises UserError, also
    where it is of none of their videos."""
    table = read_table(path, listener, "table of views")
    absent = [name for name in ("eid", "video", "view") if name not in table]
    if absent:
        raise UserError(f"{path} has no column {', '.join(absent)} (it has: {some(table.columns)})")
    rows = table[["eid", "video", "view"]].dropna().apply(lambda x: x.str.strip())
    rows["eid"] = clean_ids(rows["eid"], path, listener)
    rows = rows.drop_duplicates()
    twice = rows[rows.duplicated(["eid", "video"])]
    if len(twice):
        listener.error(
            f"{path}: {len(twice)} videos have two views: {some(twice['video'])}",
            "keep one row a video",
        )
    found = rows[rows["eid"].isin(eids)]
    if n := len(rows) - len(found):
        listener.note(f"{path}: {n} rows are of other studies than those that are explained")
    views = found.set_index(["eid", "video"])["view"].to_dict()
    if not any((eid, name) in views for eid in found["eid"].unique() for name in names(store, eid)):
        raise UserError(f"{path} has no video of these studies: compare its eid and video")
    return views


def names(store, eid):
    """Of a study's videos; none of one that cannot be read."""
    try:
        return store.read(eid).videos
    except UnreadableStudy:
        return []


def write_views(videos, views, patients, path):
    """How much each view counts, by label: a table and a figure beside `path`.

    videos: rows of the long table. A view's `share` is that of its videos in a study's summed
    absolute scores; `per_video` divides by the share of its videos among the study's, so
    that 1 is a view that counts as its videos' number would have it. Intervals are over patients.
    """
    names = zip(videos["eid"], videos["video"], strict=True)
    rows = videos.assign(view=[views.get(name) for name in names])
    unknown = rows["view"].isna()
    if unknown.any():
        n = int(rows.loc[unknown, ["eid", "video"]].drop_duplicates().shape[0])
        print(f"{n} videos are not in the table of views: they count as 'unknown'")
    if n := int(rows["score"].isna().sum()):
        print(f"{n} scores are blank (a study of one video): they count for no view")
    rows = rows.dropna(subset=["score"])
    rows["view"] = rows["view"].fillna("unknown")
    rows["size"] = rows["score"].abs()
    of_study = rows.groupby(["label", "eid"])["size"]
    rows["share"] = rows["size"] / of_study.transform("sum").clip(lower=1e-30)
    rows["part"] = 1 / of_study.transform("size")
    found = []
    for (label, view), part in rows.groupby(["label", "view"]):
        sums = part.groupby("eid")[["share", "part", "score"]].sum()
        each = (sums["share"] / sums["part"]).to_dict()
        low, high = interval_of(each, patients)
        found.append({
            "label": label, "view": view, "studies": len(sums), "videos": len(part),
            "share": sums["share"].mean(), "per_video": np.mean(list(each.values())),
            "per_video_low": low, "per_video_high": high, "score": part["score"].mean(),
        })  # fmt: skip
    found = pd.DataFrame(found)
    write_table(found, path.with_name(path.name + ".views.csv"))
    plot_views(found, path.with_name(path.name + ".views"))
    return found


def plot_views(found, path):
    """Importance of a video of each view, the mean over labels, with the labels as points."""
    mean = found.groupby("view")["per_video"].mean().sort_values()
    figure, axis = new_figure(figsize=(6, 1.2 + 0.35 * len(mean)), layout="constrained")
    one = found["label"].nunique() == 1
    for y, view in enumerate(mean.index):
        part = found[found["view"] == view]
        axis.plot(part["per_video"], [y] * len(part), "o", color=OKABE_ITO[0], alpha=0.6)
        if one:
            ends = part.iloc[0][["per_video_low", "per_video_high"]].to_numpy(float)
            axis.plot(ends, [y, y], color=OKABE_ITO[0])
    axis.axvline(1, color="grey", lw=0.8)
    axis.set_yticks(range(len(mean)), mean.index)
    axis.set(xlabel="importance of a video, 1: as any other (absolute scores)")
    save_figure(figure, path)
