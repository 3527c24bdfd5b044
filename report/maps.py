"""Study embeddings in a plane, and how well datasets can be told apart by them."""

import pandas as pd


def map_positions(x, method):
    """Places (S, 2) of study embeddings x (S, D) in a plane, and the names of the two axes.

    PCA of the centred numbers, not standardised, since all have one unit; or t-SNE (van der Maaten
    and Hinton, JMLR 2008) of its first 50 components. The same numbers give the same map.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    pca = PCA(min(50, *x.shape), random_state=0)
    z = pca.fit_transform(x)
    if method == "pca":
        shares = enumerate(pca.explained_variance_ratio_[:2], start=1)
        return z[:, :2], [f"component {k} ({share:.0%} of the variance)" for k, share in shares]
    perplexity = min(30, (len(x) - 1) / 3)  # neighbours looked at; there must be so many
    z = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(z)
    return z, ["t-SNE 1", "t-SNE 2"]


def shift_between(x, datasets, patients):
    """How well the datasets can be told apart by study embeddings x (S, D), as a sentence.

    AUROC of a logistic regression on 50 principal components, cross-validated with a patient's
    studies kept together; of more than two datasets the mean of each against the rest.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if patients.groupby(datasets).nunique().min() < 20:
        return "too few patients to say how well the datasets can be told apart (20 of each)"
    classifier = make_pipeline(
        PCA(min(50, len(x) // 2), random_state=0), StandardScaler(), LogisticRegression(C=0.1)
    )
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    p = cross_val_predict(
        classifier, x, datasets, groups=patients, cv=folds, method="predict_proba"
    )
    if datasets.nunique() == 2:
        auroc = roc_auc_score(datasets == datasets.max(), p[:, 1])
    else:
        auroc = roc_auc_score(datasets, p, multi_class="ovr")
    return f"telling the datasets apart: AUROC {auroc:.2f} (0.5: no shift between them)"


def as_numbers(values):
    """A column as numbers when all of them are, else as text."""
    numbers = pd.to_numeric(values, errors="coerce")
    return numbers if (numbers.notna() == values.notna()).all() else values.str.strip()
