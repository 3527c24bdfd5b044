"""Figures, as PDF and PNG."""

import io

import numpy as np
import pandas as pd

from common.files import atomic_path


def new_figure(*args, **kwargs):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(*args, **kwargs)


def save_figure(figure, path):
    """As PDF and PNG."""
    import matplotlib.pyplot as plt

    for suffix in (".pdf", ".png"):
        picture = io.BytesIO()  # a full disk would leave matplotlib in the middle of a page
        figure.savefig(picture, dpi=120, format=suffix[1:])
        with atomic_path(path.with_name(path.name + suffix)) as temporary:
            temporary.write_bytes(picture.getbuffer())
    plt.close(figure)


def plot_history(history, folder):
    """Losses over epochs: training_progress.pdf and .png."""
    figure, axis = new_figure(figsize=(6, 4))  # a fixed layout: drawn in every epoch
    axis.plot(history["epochs_trained"], history["train_loss"], label="training")
    axis.plot(history["epochs_trained"], history["val_loss"], label="validation")
    axis.set(xlabel="epoch", ylabel="loss")
    axis.legend()
    save_figure(figure, folder / "training_progress")


def plot_evaluation(model, truth, predicted, name):
    """A panel a label: ROC curves, or predicted against measured; returns the PDF's name."""
    from report.metrics import auroc

    n = len(model.labels)
    columns = min(n, 4)
    figure, axes = new_figure(
        -(-n // columns), columns, figsize=(3.6 * columns, 3.4 * -(-n // columns)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[n:]:
        axis.axis("off")
    for i, (axis, label) in enumerate(zip(axes.flat, model.labels, strict=False)):
        known = ~np.isnan(truth[:, i] + predicted[:, i])
        y, p = truth[known, i], predicted[known, i]
        if model.type == "binary":
            draw_roc(axis, y, p)
            axis.set_title(f"{label}: AUROC {auroc(y, p):.2f} (n = {len(y)}, {y.sum():.0f} +)")
        else:
            unit = f" [{model.units[label]}]" if label in model.units else ""
            axis.scatter(y, p, s=10, alpha=0.6)
            if len(y):
                axis.axline((y.mean(), y.mean()), slope=1, color="grey", lw=0.8)
            axis.set(xlabel=f"measured{unit}", ylabel=f"predicted{unit}")
            error = np.median(abs(y - p)) if len(y) else np.nan
            axis.set_title(f"{label}: median error {error:.3g}, n = {len(y)}")
        axis.title.set_fontsize(9)
    file = f"{'roc_curves' if model.type == 'binary' else 'scatter_plots'}_{name}"
    save_figure(figure, model.folder / file)
    return file + ".pdf"


OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "black")

MARKERS = "os^DvP*X"  # shapes as well as colours, for the colour-blind and for print

MISSING_GREY = "#BBBBBB"


def plot_map(points, axes, title, note, path):
    """Studies in a plane, coloured by `value`; more than one dataset: the shape says which.

    points: DataFrame (dataset, value, x, y). Numbers of more than eight values get a colour bar
    from their 1st to their 99th percentile, everything else a legend.
    """
    figure, axis = new_figure(figsize=(7, 4.8), layout="constrained")
    datasets, value = points["dataset"].unique(), points["value"]
    shapes = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(datasets)}
    continuous = pd.api.types.is_numeric_dtype(value) and value.nunique() > len(OKABE_ITO)
    if continuous:
        low, high = value.quantile([0.01, 0.99])
        scale_of = dict(cmap="viridis", vmin=low, vmax=high)
        legend = {}
    else:
        value, legend = categories_of(value)
    size = float(np.clip(6000 / len(points), 4, 30))
    drawn = None
    for name, shape in shapes.items():
        here = points["dataset"] == name
        none, some = points[here & value.isna()], points[here & value.notna()]
        axis.scatter(none["x"], none["y"], s=size, marker=shape, color=MISSING_GREY, lw=0)
        how = dict(c=value[some.index], **scale_of) if continuous else {}
        how = how or dict(color=[legend[v] for v in value[some.index]])
        drawn = axis.scatter(some["x"], some["y"], s=size, marker=shape, alpha=0.75, lw=0, **how)
    axis.set(xlabel=axes[0], ylabel=axes[1])
    axis.set_title(note, fontsize=9)
    if continuous:
        figure.colorbar(drawn, label=title, extend="both")
    counts = value.value_counts()
    entries = [(f"{v} ({counts[v]})", shapes.get(v, "o"), legend[v]) for v in legend]
    if value.isna().any():
        entries.append((f"missing ({value.isna().sum()})", "o", MISSING_GREY))
    if len(datasets) > 1 and set(legend) != set(datasets):
        entries += [(name, shape, "white") for name, shape in shapes.items()]
    handles = [
        axis.plot([], [], marker, color=colour, label=label, mec="black", mew=0.5)[0]
        for label, marker, colour in entries
    ]
    if handles:
        figure.legend(
            handles=handles, title="" if continuous else title, loc="outside right upper",
            fontsize=8, title_fontsize=8,
        )  # fmt: skip
    save_figure(figure, path)


def categories_of(value):
    """Values as text, all but the commonest as 'other', and the colour of each."""
    text = value.map(lambda v: f"{v:g}" if isinstance(v, float) else str(v), na_action="ignore")
    common = list(text.value_counts().index)
    if len(common) > len(OKABE_ITO):
        common = common[: len(OKABE_ITO) - 1]
        text = text.where(text.isin(common) | text.isna(), "other")
        return text, dict(zip([*sorted(common), "other"], OKABE_ITO, strict=True))
    return text, dict(zip(sorted(common), OKABE_ITO, strict=False))


def draw_roc(axis, y, p):
    from sklearn.metrics import roc_curve

    axis.plot([0, 1], [0, 1], color="grey", lw=0.8)
    if 0 < y.sum() < len(y):
        false_positive, true_positive, _ = roc_curve(y, p)
        axis.plot(false_positive, true_positive)
    axis.set(xlabel="1 - specificity", ylabel="sensitivity", aspect="equal")
