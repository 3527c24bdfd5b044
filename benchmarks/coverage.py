"""Coverage of the 95 % intervals of metrics in simulated cohorts: python benchmarks/coverage.py

Each scenario draws cohorts from a known distribution; the true value of each metric is computed
from a cohort of 400,000 patients. The result is the share of cohorts whose interval contains it;
with 400 cohorts its standard error is 0.011.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from scipy import special

from benchmarks.machine import describe
from echofocus_core.study.kinds.binary import BinaryOutcome
from echofocus_core.study.kinds.regression import RegressionOutcome
from echofocus_core.study.statistics import estimates

LARGE = 400_000  # patients
SEPARATION = 1.5  # of the classes, in standard deviations: an AUROC of 0.856
SHARED = 0.5  # share of the score's variance that the studies of a patient have in common
FINDINGS = {
    "60 patients, 30 %": dict(n=60, share=0.3),
    "40 patients, 1-8 studies, 30 %": dict(n=40, most=8, share=0.3),
    "300 patients, 2 %": dict(n=300, share=0.02),
    "60, probabilities rounded to 0.1": dict(n=60, share=0.3, decimals=1),
    "20 patients, 40 %": dict(n=20, share=0.4),
    "150 patients, 1-8 studies, 10 %": dict(n=150, most=8, share=0.1),
    "200 patients, 5 %": dict(n=200, share=0.05),
    "150, overconfident": dict(n=150, share=0.3, slope=2.0),
}
MEASUREMENTS = {
    "30 patients": dict(n=30),
    "40 patients, 1-8 studies": dict(n=40, most=8),
    "12 patients": dict(n=12),
}


def studies_of(rng, n, most):
    """The patient of each study (S,): each has 1 to `most` studies."""
    return np.repeat(np.arange(n), rng.integers(1, most + 1, n))


def finding(rng, n, share, most=1, decimals=None, slope=1.0):
    """(patients (S,), BinaryOutcome): one truth per patient; calibrated where slope is 1."""
    patient = studies_of(rng, n, most)
    y = (rng.random(n) < share).astype(float)[patient]
    noise = np.sqrt(SHARED) * rng.normal(size=n)[patient]
    score = SEPARATION * y + noise + np.sqrt(1 - SHARED) * rng.normal(size=len(patient))
    p = special.expit(slope * (special.logit(share) + SEPARATION * (score - SEPARATION / 2)))
    p = p if decimals is None else np.round(p, decimals)
    return patient, BinaryOutcome("finding", y, p, share)


def measurement(rng, n, most=1):
    """(patients (S,), RegressionOutcome): an ejection fraction and its estimate, in %."""
    patient = studies_of(rng, n, most)
    truth = 60 + 8 * rng.normal(size=n)[patient] + 4 * rng.normal(size=len(patient))
    error = 4 * rng.normal(size=n)[patient] + 4 * rng.normal(size=len(patient))
    return patient, RegressionOutcome("EF", truth, 60 + 0.7 * (truth - 60) + error, "%")


def coverage(draw, options, cohorts, n_boot=1000, seed=7):
    """{metric: (coverage, cohorts with an interval)}."""
    rng = np.random.default_rng(seed)
    _, large = draw(rng, **{**options, "n": LARGE})
    true = {name: x[0] for name, x in large.metrics(np.ones((len(large.truth), 1))).items()}
    inside = {}
    for i in range(cohorts):
        patients, outcome = draw(rng, **options)
        for x in estimates([outcome], patients, n_boot, seed=i):
            if np.isfinite(x.ci_low):
                hit = x.ci_low - 1e-9 <= true[x.metric] <= x.ci_high + 1e-9
                inside.setdefault(x.metric, []).append(hit)
    return {metric: (float(np.mean(hits)), len(hits)) for metric, hits in inside.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cohorts", type=int, default=400, help="of each scenario")
    parser.add_argument("--n_boot", type=int, default=1000)
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    rows = {}
    for draw, scenarios in ((finding, FINDINGS), (measurement, MEASUREMENTS)):
        for name, options in scenarios.items():
            rows[name] = coverage(draw, options, args.cohorts, args.n_boot)
            shown = ", ".join(f"{metric} {share:.3f}" for metric, (share, _) in rows[name].items())
            print(f"{name}: {shown}", flush=True)
    report = {"machine": describe("cpu"), "options": vars(args), "rows": rows}
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
