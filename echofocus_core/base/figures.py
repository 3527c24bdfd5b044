"""Figures, as PDF and PNG."""

import numpy as np
import pandas as pd

from echofocus_core.base.files import atomic_path


def new_figure(*args, **kwargs):
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # show $ in labels unchanged
    import matplotlib.pyplot as plt

    return plt.subplots(*args, **kwargs)


def save_figure(figure, path):
    """Save a figure as PDF and PNG, then close it."""
    import matplotlib.pyplot as plt

    for suffix in (".pdf", ".png"):
        with atomic_path(path.with_name(path.name + suffix)) as temporary:
            figure.savefig(temporary, dpi=120, format=suffix[1:])
        figure.set_layout_engine("none")  # keep the layout of the first file
    plt.close(figure)


def plot_history(history, folder):
    """Plot losses over epochs: training_progress.pdf and .png."""
    figure, axis = new_figure(figsize=(6, 4))  # drawn in every epoch: a fixed layout is fast
    axis.plot(history["epochs_trained"], history["train_loss"], label="training")
    axis.plot(history["epochs_trained"], history["val_loss"], label="validation")
    best = history.loc[history["val_loss"].idxmin()]
    label = f"best: epoch {best['epochs_trained']:.0f}"
    axis.plot(best["epochs_trained"], best["val_loss"], "o", color="black", ms=5, label=label)
    axis.set(xlabel="epoch", ylabel="loss")
    axis.legend()
    save_figure(figure, folder / "training_progress")


OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "black")
MARKERS = "os^DvP*X"  # shapes as well as colours, for colour-blind readers and for print
MISSING_GREY = "#BBBBBB"


def plot_map(points, axes, title, note, path):
    """Plot studies in two dimensions, coloured by `value`, with a marker shape for each dataset.

    points: DataFrame (dataset, value, x, y). More than eight different numbers get a colour bar
    from the 1st to the 99th percentile, other values a legend.
    """
    figure, axis = new_figure(figsize=(7, 4.8), layout="constrained")
    datasets, value = points["dataset"].unique(), points["value"]
    shapes = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(datasets)}
    continuous = pd.api.types.is_numeric_dtype(value) and value.nunique() > len(OKABE_ITO)
    if continuous:
        low, high = value.quantile([0.01, 0.99])
        colours, scale, legend = value, dict(cmap="viridis", vmin=low, vmax=high), {}
    else:
        value, legend = categories_of(value)
        colours, scale = value.map(legend), {}
    size = float(np.clip(6000 / len(points), 4, 30))
    cloud = None
    for name, shape in shapes.items():
        rows = points["dataset"] == name
        empty, filled = points[rows & value.isna()], points[rows & value.notna()]
        axis.scatter(empty["x"], empty["y"], s=size, marker=shape, color=MISSING_GREY, lw=0)
        cloud = axis.scatter(
            filled["x"], filled["y"], s=size, marker=shape, alpha=0.75, lw=0,
            c=colours[filled.index], **scale,
        )  # fmt: skip
    axis.set(xlabel=axes[0], ylabel=axes[1])
    axis.set_title(note, fontsize=9)
    if continuous:
        figure.colorbar(cloud, label=title, extend="both")
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
    """(values as text, with the less frequent ones as 'other'; dict of text to colour)."""
    text = value.map(lambda v: f"{v:g}" if isinstance(v, float) else str(v), na_action="ignore")
    names = list(text.value_counts().index)
    if len(names) > len(OKABE_ITO):
        names = names[: len(OKABE_ITO) - 1]
        text = text.where(text.isin(names) | text.isna(), "other")
        return text, dict(zip([*sorted(names), "other"], OKABE_ITO, strict=True))
    return text, dict(zip(sorted(names), OKABE_ITO, strict=False))
