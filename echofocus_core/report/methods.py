"""For the methods section of a paper: the statistical methods, and the model and its training."""

import numpy as np

from echofocus_core import __version__
from echofocus_core.base.console import count_of, some
from echofocus_core.base.files import sha256_file
from echofocus_core.report.display import Table, metric_name
from echofocus_core.report.recalibration import METHODS
from echofocus_core.video.store import encoder_text

INTERVALS = {  # of `statistics.INTERVALS`
    "percentile": "percentile intervals, widened for small numbers of patients (Hesterberg 2015)",
    "normal": "Wald intervals with the standard error from the resamples",
    "wilson": "Wilson's interval with the effective sample size from the resamples (Dean and "
    "Pagano 2015)",
    "logit": "intervals on the log-odds scale with the standard error from the resamples, "
    "Wilson's for values of 0 and 1",
    "log": "intervals on the logarithmic scale with the standard error from the resamples",
    "log_rest": "intervals on the scale of log(1 - value) with the standard deviation of the "
    "resamples",
    "fisher": "intervals on Fisher's z scale with the standard deviation of the resamples",
    "limit_of_agreement": "the standard error of Bland and Altman (1986) with an effective sample "
    "size",
}
INTERVALS |= dict.fromkeys(
    ("lr_positive", "lr_negative"),
    "the logarithmic method of Simel (1991) with effective sample sizes",
)
CHOSEN = "in the validation fold"
# Of a calibration curve: the share of the studies that each point uses, the fewest studies.
SPAN, FEWEST = 0.75, 10


def methods_paragraph(report):
    """The paragraph, from what a `report.evaluation.Report` computed."""
    parts = (cohort(report), models(report), kinds(report), thresholds(report))
    return " ".join([*filter(None, parts), *intervals(report), *tests(report)])


def cohort(report):
    facts, studies = report.facts, report.studies
    n_patients = len(np.unique(studies.patients))
    where, dataset = facts.get("fold", "all"), facts.get("dataset") or "the data set"
    if report.folds:
        where = f"the test folds of a cross-validation in {dataset}"
    else:
        where = f"{'all folds' if where == 'all' else f'{where} fold'} of {dataset}"
    if facts.get("per") != "patient":
        counts = f"{count_of(len(studies), 'studies')} of {count_of(n_patients, 'patients')}"
        text = f"Performance was evaluated in {counts} ({where})."
        if facts.get("first_study_only"):
            text += " Only the first study of each patient was used."
        return text
    rules = {
        "mean": "the mean over a patient's studies of the predictions, and of the truths of "
        "measurements; patients whose studies differ in a finding were left out",
        "first": "a patient's first study with a truth and a prediction",
        "last": "a patient's last study with a truth and a prediction",
    }
    if len(studies.outcomes) <= 12:
        used = ", ".join(f"{o.n} ({o.label})" for o in studies.outcomes)
    else:
        sizes = [o.n for o in studies.outcomes]
        used = f"{min(sizes)} to {max(sizes)}, by label"
    return (
        f"Performance was evaluated in {n_patients} patients ({where}), by {rules[facts['pool']]}. "
        f"Each metric uses the patients with a truth and a prediction: {used}."
    )


def models(report):
    if report.folds:
        n = len(report.folds)
        return (
            f"{n} models were trained, one for each fold; each study was predicted by the model "
            "that had not seen its patient. Metrics are of the pooled predictions; the mean and "
            f"standard deviation over the {n} folds are also given, because pooling the scores of "
            "different models biases the AUROC downwards (Airola 2011)."
        )
    if averaged := report.facts.get("averaged"):
        return f"The predictions are the mean over the models {averaged}."
    return ""


def kinds(report):
    text = " ".join(dict.fromkeys(o.methods for o in report.studies.outcomes))
    if any("reliability" in o.figures and o.n >= FEWEST for o in report.studies.outcomes):
        text += (
            f" Calibration curves are local linear regressions (LOWESS, span {SPAN}) with "
            "pointwise bootstrap bands over patients."
        )
    if fits := {name for each in getattr(report, "recalibrated", {}).values() for name in each}:
        names = [
            "logistic with " * (m != "isotonic") + METHODS[m].lower() for m in METHODS if m in fits
        ]
        where = "of each model" if report.folds else ""
        text += f" Recalibration ({', '.join(names)}) was fitted on the validation fold {where}"
        text = text.rstrip() + "."
    return text


def thresholds(report):
    facts, outcomes = report.facts, report.studies.outcomes
    if all(o.threshold is None for o in outcomes):
        return ""
    target, chosen = facts.get("target"), CHOSEN
    if report.folds:
        chosen = "in the validation fold of each model, so that each fold has its own threshold"
    elif facts.get("mean_thresholds"):
        chosen = "in the validation fold of each averaged model; the threshold is their mean"
    if not target:
        choice = "given with the predictions"
    elif target == "youden":
        choice = f"chosen to maximise Youden's index {chosen}"
    elif "=" in target:
        choice = f"chosen to reach a {target.replace('=', ' of ')} {chosen}"
    else:
        choice = f"chosen by {target} {chosen}"
    text = (
        "Sensitivity, specificity, predictive values, likelihood ratios and F1 are given at the "
        f"threshold {choice}."
    )
    if facts.get("prevalence") is not None:
        text += (
            " Predictive values are also given for a prevalence of "
            f"{facts['prevalence']:g}, by Bayes' theorem."
        )
    return text


def intervals(report):
    """Sentences on the 95 % intervals: their resamples, and the method of each metric."""
    if not report.n_boot:
        return
    used = {}
    outcomes = {o.label: o for o in report.studies.outcomes}
    for x in report.estimates:
        if x.label in outcomes and np.isfinite(x.ci_low):
            method = outcomes[x.label].metric(x.metric).interval
            names = used.setdefault(INTERVALS[method], {})
            names[group_name(x.metric)] = True
    per = "" if report.facts.get("per") == "patient" else ", all studies of a patient together"
    yield (
        f"95 % confidence intervals are based on {report.n_boot} bootstrap resamples of patients"
        f"{per} (seed {report.seed}), with quantiles of Student's t for the number of patients "
        "that limits the precision (for a finding, usually those in the rarer class)."
    )
    if used:
        texts = (f"{', '.join(names)}: {method}" for method, names in used.items())
        yield f"Methods of the intervals: {'; '.join(texts)}."
    if any(x.label == "mean" for x in report.estimates):
        yield "Means over labels have percentile intervals."


def group_name(metric):
    """A metric's name, with one name for the AUROCs of classes and times and for quarters."""
    if metric.startswith("auroc_at_"):
        return "dynamic AUROC"
    if metric.startswith("auroc_"):
        return "AUROC of each class"
    return metric_name(metric.partition("_q")[0])


def tests(report):
    """Sentences on subgroups and on comparisons with other models, then the program."""
    labels = "; p values are also given adjusted by Holm's method for the number of labels"
    if report.by:
        adjusted = labels if len(report.studies.outcomes) > 1 else ""
        yield (
            f"Subgroups by {', '.join(report.by)} were evaluated in the same way, with a test of "
            "interaction on the scale of each metric's interval (Altman and Bland 2003; Cochran's Q"
            " for more than two groups), which treats groups as independent and leaves out studies "
            f"with a missing value{adjusted}."
        )
    if report.others:
        p_values = [r["p_value"] for r in report.comparison if r["p_value"] is not None]
        adjusted = f"{labels} and models" if len(p_values) > 1 else ""
        yield (
            f"Models ({some(report.others)}) were compared on the same studies: the AUROC of "
            "findings by DeLong's test for clustered data (Obuchowski 1997), other metrics by the "
            f"paired bootstrap with percentile intervals{adjusted}."
        )
    yield f"Computed with EchoFocus {__version__}."


# ------------------------------------------------------------------------------------------- model


def model_table(model, names, history, of_folds=False):
    """Table of a LoadedModel: its labels, network, input, training and digests.

    names: label -> plain name; history: of its epochs, or None; of_folds: whether it describes
    all models of a cross-validation.
    """
    record, checkpoint = model.record, model.folder / "best_checkpoint.pt"
    settings, rows = record.settings, []
    labels = [f"{names[x]} ({x})" if names.get(x, x) != x else x for x in model.outputs.labels]
    rows.append(["Labels", f"{len(labels)}: {'; '.join(labels)}"])
    net = getattr(model.net, "nets", [model.net])[0]
    if kind := getattr(net, "architecture", {}).get("transformer_type"):
        n = sum(p.numel() for p in net.parameters())
        depth = net.architecture["encoder_depth"]
        rows.append(
            [
                "Aggregator",
                f"{kind}, {depth} layer{'s' * (depth != 1)}, {n / 1e6:.3g} million parameters",
            ]
        )
    for name, given in record.inputs.items():
        parts = {
            "": encoder_text(given.model_dump(exclude_none=True)), "pixels": given.size,
            "frames per clip": given.clip_len, "clips per video": given.n_clips,
            "sampling": given.sampling, "mask": given.mask,
        }  # fmt: skip
        text = ", ".join(f"{key} {x}".strip() for key, x in parts.items() if x is not None)
        rows.append([f"Encoder {name}".strip(), text])
        rows.append(["SHA-256 of the encoder", given.weights_sha256])
    if record.task:
        epochs = f"at most {settings.epoch_lim} epochs" if settings.epoch_lim > 0 else "no limit"
        if history is not None and history["val_loss"].notna().any():
            trained, best = history["epochs_trained"], history["val_loss"].idxmin()
            epochs = f"trained for {trained.max()} ({epochs}); the best was epoch {trained[best]}"
        rows += [
            ["Training data", f"{record.dataset}, task {record.task}"],
            ["Optimiser", f"AdamW, learning rate {settings.learning_rate:g}, weight decay 0.01, "
             f"{settings.batch_number} studies per step, the rate halved after 3 epochs without a "
             "lower validation loss"],
            ["Epochs", f"{epochs}. Training stops after {settings.epoch_early_stop} epochs without "
             "a lower validation loss; the model is that of the best epoch"],
            ["Started from", settings.init_from],
            ["Seed", settings.seed],
            ["SHA-256 of the training labels", record.labels_sha256],
            ["Trained with", f"EchoFocus {record.version}" * bool(record.version)],
        ]  # fmt: skip
    if checkpoint.is_file() and not of_folds:
        rows.append(["SHA-256 of the model", sha256_file(checkpoint)])
    rows = [[name, text] for name, text in rows if text not in (None, "")]
    return Table("Model and training", ["", ""], rows, n_text=2)
