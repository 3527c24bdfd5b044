"""Maps of study embeddings in two dimensions, and how well they separate datasets."""

import h5py
import numpy as np
import pandas as pd

from echofocus_core.base.console import UserError, count_of
from echofocus_core.base.figures import plot_map
from echofocus_core.base.files import in_file_name, write_table
from echofocus_core.study.labels import label_file, read_labels, read_rows


def map_rows(job):
    """The rows of each dataset's label table: dict of name to DataFrame or None.

    Columns pid and, unless studies are coloured by dataset, that of --color_by: numbers if all
    cells are numbers, else text. Raises UserError if no table has the column.
    """
    column, task, datasets = job.settings.color_by.strip(), job.task, job.datasets
    if column in ("pid", "eid"):
        raise UserError(f"--color_by {column}: patient and study ids cannot be used as colours")
    columns, rows, reasons = [] if column == "dataset" else [column], {}, []
    for name, dataset in datasets.items():
        file = label_file(task, dataset)
        try:
            if file.path is None:
                raise UserError("no label table: name one with --label_path, or in the config")
            if columns and task and column in task.task_labels:
                of_column = task.model_copy(update={"task_labels": columns})
                _, rows[name] = read_labels(file, of_column)
            else:
                rows[name] = read_rows(file, columns)
        except UserError as error:
            rows[name] = None
            reasons.append(str(error))
            continue
    if columns and len(reasons) == len(datasets):
        raise UserError(f"--color_by {column}: {reasons[0]}")
    for reason in reasons if columns else ():
        print(f"no colours: {reason}")
    return rows


def make_map(files, rows, model, settings):
    """Map the study embeddings of some datasets: map_*.csv, .png and .pdf in the model's folder.

    files: dataset -> file of study embeddings; rows: see `map_rows`.
    """
    eids, x, names = [], [], []
    for name, path in files.items():
        with h5py.File(path, "r") as f:
            eids += list(f)
            x += [f[eid][:] for eid in f]
            names += [name] * len(f)
    x, column = np.stack(x), settings.color_by.strip()
    if len(x) < 4 or not np.isfinite(x).all() or not np.ptp(x, axis=0).any():
        raise UserError("a map needs different embeddings of at least four studies")
    points = pd.DataFrame({"eid": eids, "dataset": names})
    of_study = [
        (rows[name] if rows[name] is not None else pd.DataFrame()).reindex(part["eid"])
        for name, part in points.groupby("dataset", sort=False)
    ]
    labels = pd.concat(of_study, ignore_index=True)
    points["value"] = points["dataset"] if column == "dataset" else as_numbers(labels[column])
    places, axes = map_positions(x, settings.map)
    points["x"], points["y"] = places.T
    shift = ""
    if len(files) > 1:
        patients = labels["pid"] if "pid" in labels else pd.Series(np.nan, index=points.index)
        patients = patients.where(patients.notna(), points["eid"])
        shift = shift_between(x, points["dataset"], patients)
        print(shift)
    by = "" if column == "dataset" else f"_by_{in_file_name(column)}"
    path = model.folder / f"map_{settings.map}_{'_'.join(files)}{by}"
    write_table(points, path.with_name(path.name + ".csv"))
    unit = f" [{model.units[column]}]" if column in model.units else ""
    plot_map(points, axes, column + unit, shift, path)
    print(f"wrote {path}.csv, .png and .pdf ({count_of(len(points), 'studies')})")


def map_positions(x, method):
    """Positions (S, 2) of study embeddings x (S, D) on the map, and the names of the two axes.

    PCA of the centred features, not standardised, since all have the same unit; or t-SNE (van der
    Maaten and Hinton, JMLR 2008) of its first 50 components. The result is reproducible.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    pca = PCA(min(50, *x.shape), random_state=0)
    z = pca.fit_transform(x)
    if method == "pca":
        shares = enumerate(pca.explained_variance_ratio_[:2], start=1)
        return z[:, :2], [f"component {k} ({share:.0%} of the variance)" for k, share in shares]
    perplexity = min(30, (len(x) - 1) / 3)  # the number of neighbours, at most
    z = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(z)
    return z, ["t-SNE 1", "t-SNE 2"]


def shift_between(x, datasets, patients):
    """How well study embeddings x (S, D) distinguish the datasets, as a sentence.

    AUROC of a logistic regression on 50 principal components, cross-validated with all studies of
    a patient in one fold; with more than two datasets, the mean of each against the others.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if patients.groupby(datasets).nunique().min() < 20:
        return "too few patients to measure the shift between the datasets (each needs 20)"
    classifier = make_pipeline(
        PCA(min(50, len(x) // 2, x.shape[1]), random_state=0),
        StandardScaler(),
        LogisticRegression(C=0.1),
    )
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    p = cross_val_predict(
        classifier, x, datasets, groups=patients, cv=folds, method="predict_proba"
    )
    if datasets.nunique() == 2:
        auroc = roc_auc_score(datasets == datasets.max(), p[:, 1])
    else:
        auroc = roc_auc_score(datasets, p, multi_class="ovr")
    return f"shift between the datasets: AUROC {auroc:.2f} (0.5: none)"


def as_numbers(values):
    """A column as numbers if all cells are numbers, else as text."""
    numbers = pd.to_numeric(values, errors="coerce")
    return numbers if (numbers.notna() == values.notna()).all() else values.str.strip()
