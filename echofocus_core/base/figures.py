"""Figures for papers, as PDF and PNG: one style, drawn at the width of one or two columns."""

import numpy as np
import pandas as pd

from echofocus_core.base.files import atomic_path

COLUMN, PAGE = 85 / 25.4, 174 / 25.4  # inches: one and two columns of a journal
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "black")
MARKERS = "os^DvP*X"  # shapes as well as colours, for colour-blind readers and for print
MISSING_GREY = "#BBBBBB"
STYLE = {  # no text below 7 points
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "legend.fontsize": 7, "legend.frameon": False, "lines.linewidth": 1.2,
    "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
    "pdf.fonttype": 42,  # text that a journal can edit
    "text.parse_math": False,  # show $ in labels unchanged
}  # fmt: skip


def new_figure(*args, **kwargs):
    """(figure, axes) in this style, as of `matplotlib.pyplot.subplots`."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(STYLE)
    import matplotlib.pyplot as plt

    return plt.subplots(*args, **kwargs)


def save_figure(figure, path):
    """Save a figure as PDF and PNG, then close it."""
    import matplotlib.pyplot as plt

    for suffix in (".pdf", ".png"):
        with atomic_path(path.with_name(path.name + suffix)) as temporary:
            figure.savefig(temporary, dpi=200, format=suffix[1:])
        figure.set_layout_engine("none")  # keep the layout of the first file
    plt.close(figure)


def plot_history(history, path, name=""):
    """Plot losses, and metrics of the validation, over epochs: <path>.pdf and .png.

    history: epochs_trained, train_loss, val_loss, and val_<metric> for each metric; or a dict of
    such tables by the name of the fold, each of which has a colour.
    """
    from matplotlib.ticker import MaxNLocator

    folds = history if isinstance(history, dict) else {"": history}
    shown = next(iter(folds.values())).dropna(axis=1, how="all").columns
    metrics = [x for x in shown if x.startswith("val_") and x != "val_loss"]
    lines = {"loss": {"training": "train_loss", "validation": "val_loss"}}
    lines |= {x.removeprefix("val_").replace("_", " "): {"validation": x} for x in metrics}
    size = (COLUMN, 2.6) if len(lines) == 1 else (PAGE, 2.6)
    figure, axes = new_figure(1, len(lines), figsize=size, squeeze=False)
    # Drawn in every epoch: a fixed layout is fast.
    figure.subplots_adjust(0.6 / size[0], 0.17, 1 - 0.1 / size[0], 0.88, wspace=0.35)
    for axis, (title, columns) in zip(axes.flat, lines.items(), strict=True):
        for k, (fold, table) in enumerate(folds.items()):
            epochs, best = table["epochs_trained"], table["val_loss"].idxmin()
            for label, column in columns.items():
                colour = OKABE_ITO[k % len(OKABE_ITO) if fold else label == "training"]
                text = "" if fold and label == "training" else fold or label
                style = dict(color=colour, ls="--" if label == "training" else "-")
                axis.plot(epochs, table[column], label=text, marker=".", ms=4, **style)
            axis.plot(
                epochs[best], table[column][best], "o", mfc="none", color="black", ms=7,
                label="" if fold else f"best: epoch {epochs[best]:.0f}",
            )  # fmt: skip
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set(xlabel="epoch", ylabel=title)
        axis.legend()
    figure.suptitle(f"Training{' of ' * bool(name)}{name}", fontsize=8)
    save_figure(figure, path)


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
