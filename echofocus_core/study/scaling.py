"""Measurements in physical units to normalised values and back, as the published models have it.

A scaling is the published `input_norm_dict`: label -> shift, apply_boxcox, lmbda, mean, stdev.
"""

import numpy as np


def boxcox(x, lmbda):
    return np.log(x) if lmbda == 0 else (x**lmbda - 1) / lmbda


def scale(values, names, scaling):
    """Physical units (S, T) -> normalised (S, T), a new array; NaN stays.

    A value below what a label's Box-Cox can take becomes NaN; what has no scaling stays.
    """
    out = np.array(values, dtype=np.float64)
    for i, name in enumerate(names):
        if not isinstance(s := scaling.get(name), dict):
            continue
        z = out[:, i] + s["shift"]
        if s["apply_boxcox"]:  # new values may be below the training minimum
            z = boxcox(np.where(z > 0, z, np.nan), s["lmbda"])
        out[:, i] = (z - s["mean"]) / s["stdev"]
    return out


def unscale(values, names, scaling):
    """Normalised (S, T) -> physical units (S, T), a new array; the inverse of `scale`.

    With a negative lambda Box-Cox ends at -1 / lambda: past it the value is NaN.
    """
    out = np.array(values, dtype=np.float64)
    for i, name in enumerate(names):
        if not isinstance(s := scaling.get(name), dict):
            continue
        z = out[:, i] * s["stdev"] + s["mean"]
        if s["apply_boxcox"]:
            lmbda = s["lmbda"]
            base = z * lmbda + 1
            base = np.maximum(base, 1e-6) if lmbda > 0 else np.where(base > 0, base, np.nan)
            z = np.exp(z) if lmbda == 0 else base ** (1 / lmbda)
        out[:, i] = z - s["shift"]
    return out


def fit_scaling(y, apply_boxcox):
    """One label's entry of the published `input_norm_dict`, from its values in training (S,).

    shift = |mean| - min; Box-Cox of value + shift for some labels (Box and Cox, 1964, lambda by
    maximum likelihood); then the mean and standard deviation of that.
    """
    from scipy.stats import boxcox_normmax

    # Box-Cox takes only positive numbers, and the mean may be 0.
    least = 1e-3 * y.std() if apply_boxcox else 0.0
    entry = {"shift": float(max(abs(y.mean()), least) - y.min()), "apply_boxcox": apply_boxcox}
    z = y + entry["shift"]
    if apply_boxcox:
        try:
            entry["lmbda"] = float(boxcox_normmax(z, method="mle"))
        except (ValueError, OverflowError):
            entry["lmbda"] = np.nan
        z = boxcox(z, entry["lmbda"])
    return entry | {"mean": float(z.mean()), "stdev": float(z.std())}


def least_value(label, scaling):
    """The least value of a label in the training fold, by the shift of `fit_scaling`: exact without
    Box-Cox, else with the middle of the values for their mean."""
    if not isinstance(entry := (scaling or {}).get(label), dict):
        return np.nan
    return abs(unscale(np.zeros((1, 1)), [label], scaling)[0, 0]) - entry["shift"]


def scaling_fault(entry):
    """Why a label's scaling cannot be used, or ''."""
    for name in ("shift", "mean", "stdev", *(["lmbda"] if entry.get("apply_boxcox") else [])):
        value = entry.get(name)
        if not isinstance(value, int | float | np.number) or not np.isfinite(value):
            return f"{name} is not a finite number"
        if abs(value) > 1e9 or (name == "stdev" and value < 1e-9):
            return f"{name} cannot be {value:g}"
    return ""
