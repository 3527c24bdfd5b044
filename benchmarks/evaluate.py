"""Metrics with intervals over patients: the vectorised bootstrap against a loop over scikit-learn.

    python benchmarks/evaluate.py --json evaluate.json

Both compute the same metrics on the same studies. The loop runs over `--loops` resamples of all
labels; its time is scaled to `--n_boot`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from scipy import special, stats
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

from benchmarks.machine import describe, peak_memory
from echofocus_core.study import metrics as mt
from echofocus_core.study import statistics as st
from echofocus_core.study.kinds.binary import BinaryOutcome
from echofocus_core.study.kinds.regression import RegressionOutcome

THRESHOLD = 0.2  # for all findings


class Ranking(BinaryOutcome):
    """A finding with AUROC and average precision only."""

    def metrics(self, weights):
        return mt.ranking(self.truth, self.predicted, weights)


def cohort(args):
    """(patients, findings, measurements) of args.studies studies from half as many patients."""
    rng = np.random.default_rng(0)
    patients = rng.integers(0, max(1, args.studies // 2), args.studies)
    findings, measurements = [], []
    for k in range(args.labels):
        x = rng.normal(size=args.studies)
        y = (rng.random(args.studies) < special.expit(x - 2)).astype(float)  # one in six
        p = special.expit(1.2 * x - 2 + 0.5 * rng.normal(size=args.studies))
        findings.append(BinaryOutcome(f"finding {k}", y, p, threshold=THRESHOLD))
        f = 60 + 8 * x + 5 * rng.normal(size=args.studies)
        measurements.append(RegressionOutcome(f"measurement {k}", 60 + 10 * x, f))
    return patients, findings, measurements


def loop_ranking(y, p):
    sk.roc_auc_score(y, p)
    sk.average_precision_score(y, p)


def loop_findings(y, p):
    loop_ranking(y, p)
    sk.brier_score_loss(y, p)
    LogisticRegression(C=np.inf).fit(special.logit(p)[:, None], y)
    called = p >= THRESHOLD
    sk.confusion_matrix(y, called)
    sk.recall_score(y, called)
    sk.precision_score(y, called)
    sk.f1_score(y, called)
    sk.class_likelihood_ratios(y, called)


def loop_measurements(y, f):
    sk.median_absolute_error(y, f)
    sk.mean_absolute_error(y, f)
    sk.root_mean_squared_error(y, f)
    sk.r2_score(y, f)
    stats.pearsonr(y, f)
    stats.spearmanr(y, f)
    np.std(f - y, ddof=1)  # bias and limits of agreement
    part = np.searchsorted(np.quantile(y, [0.25, 0.5, 0.75]), y)
    for q in range(4):
        sk.median_absolute_error(y[part == q], f[part == q])


def seconds_of_loop(function, outcomes, patients, args):
    """Seconds for `n_boot` resamples of patients, each evaluated by scikit-learn."""
    order = np.argsort(patients, kind="stable")
    _, starts = np.unique(patients[order], return_index=True)
    studies_of = np.split(order, starts[1:])
    rng = np.random.default_rng(1)
    began = time.perf_counter()
    for _ in range(args.loops):
        drawn = np.concatenate([studies_of[i] for i in rng.integers(len(starts), size=len(starts))])
        for o in outcomes:
            function(o.truth[drawn], o.predicted[drawn])
    return (time.perf_counter() - began) * args.n_boot / args.loops


def timed(function):
    """(seconds, CPU seconds); they differ on a shared machine."""
    began, used = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - began, time.process_time() - used


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=10_000)
    parser.add_argument("--labels", type=int, default=22)
    parser.add_argument("--n_boot", type=int, default=1000)
    parser.add_argument("--loops", type=int, default=5)
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    patients, findings, measurements = cohort(args)

    rankings = [Ranking(o.label, o.truth, o.predicted) for o in findings]
    ways = {
        "ranking": (
            lambda: st.bootstrap(rankings, patients, args.n_boot),
            (loop_ranking, findings),
        ),
        "findings": (
            lambda: st.estimates(findings, patients, args.n_boot),
            (loop_findings, findings),
        ),
        "measurements": (
            lambda: st.estimates(measurements, patients, args.n_boot),
            (loop_measurements, measurements),
        ),
    }
    print(
        f"{describe('cpu')}; {args.labels} labels, {args.studies} studies, {args.n_boot} resamples"
    )
    seconds, ratios = {}, {}
    for name, (ours, slow) in ways.items():
        seconds[name], seconds[f"{name}_cpu"] = timed(ours)
        seconds[f"{name}_loop"] = seconds_of_loop(*slow, patients, args)
        ratios[name] = seconds[f"{name}_loop"] / seconds[name]
        loop, cpu = seconds[f"{name}_loop"], seconds[f"{name}_cpu"]
        print(f"{name}: {seconds[name]:.1f} s ({cpu:.1f} CPU)", end="")
        print(f", a loop over scikit-learn {loop:.0f} s, {ratios[name]:.0f} times slower")
    print(f"peak memory {peak_memory('cpu') / 1e9:.2f} GB")
    if args.json:
        table = {"machine": describe("cpu"), "seconds": seconds, "ratios": ratios}
        Path(args.json).write_text(json.dumps(table | {"peak_bytes": peak_memory("cpu")}, indent=2))


if __name__ == "__main__":
    main()
