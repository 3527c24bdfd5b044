"""From predictions of labelled studies to what is read: tables, figures and one page."""

import pandas as pd

from report import statistics as st

COLUMNS = ("label", "metric", "value", "ci_low", "ci_high", "n", "n_positive", "unit", "note")


def outcomes_of(labels, truth, predicted, kind, units, thresholds):
    """One outcome a label. truth, predicted (S, T) in physical units or probabilities."""
    if kind == "binary":
        return [
            st.Binary(label, y, p, threshold=thresholds.get(label))
            for label, y, p in zip(labels, truth.T, predicted.T, strict=True)
        ]
    return [
        st.Regression(label, y, p, units.get(label, ""))
        for label, y, p in zip(labels, truth.T, predicted.T, strict=True)
    ]


def metrics_table(estimates):
    """DataFrame: a row a label and metric."""
    return pd.DataFrame([x.row() for x in estimates], columns=list(COLUMNS))
