"""Figures, as PDF and PNG."""

import io

import numpy as np
import pandas as pd

from echofocus_core.base.files import atomic_path


def new_figure(*args, **kwargs):
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # $ in the names of labels and groups is a $
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
        figure.set_layout_engine("none")  # laid out by the first one
    plt.close(figure)


def plot_history(history, folder):
    """Losses over epochs: training_progress.pdf and .png."""
    figure, axis = new_figure(figsize=(6, 4))  # a fixed layout: drawn in every epoch
    axis.plot(history["epochs_trained"], history["train_loss"], label="training")
    axis.plot(history["epochs_trained"], history["val_loss"], label="validation")
    best = history.loc[history["val_loss"].idxmin()]
    chosen = f"chosen: epoch {best['epochs_trained']:.0f}"
    axis.plot(best["epochs_trained"], best["val_loss"], "o", color="black", ms=5, label=chosen)
    axis.set(xlabel="epoch", ylabel="loss")
    axis.legend()
    save_figure(figure, folder / "training_progress")


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
