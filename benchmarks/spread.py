"""Coverage of the 90 % ranges of answers by other extractions: python benchmarks/spread.py

Phantom cines longer than a clip, an untrained encoder with standardised embeddings (as in the
demo), and a model for each label, trained on one extraction. Other studies are then extracted with
several seeds. The result is the share of pairs of extractions in which the answer of one is in
the range of the other, for each label and each method of drawing starts.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import echofocus as ef
from benchmarks.machine import describe
from echofocus_core.base.console import progress
from echofocus_core.report import demo
from echofocus_core.video import extract, phantom

LABELS = {"ef": "EF", "defect": "VSD"}  # task -> label


def run(main, line):
    with contextlib.redirect_stdout(io.StringIO()):
        main([str(x) for x in line])


def coverage(tables, label, unit=""):
    """A dict of the share of pairs of extractions within the range, its median width, and the
    median width expected if the difference of two extractions is normal.

    tables: results of `predict` on the same studies, one per extraction.
    """
    value, low, high = (
        np.stack([t[f"{label}{end}{unit}"].to_numpy() for t in tables])
        for end in ("", "_low", "_high")
    )
    pairs = permutations(range(len(tables)), 2)
    inside = [(low[i] <= value[j]) & (value[j] <= high[i]) for i, j in pairs]
    between = 2 * 1.645 * np.sqrt(2) * value.std(0, ddof=1)
    return {
        "coverage": float(np.mean(inside)),
        "width": float(np.median(high - low)),
        "between": float(np.median(between)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", type=int, default=80, help="studies to train on")
    parser.add_argument("--studies", type=int, default=40, help="studies to predict")
    parser.add_argument("--seeds", type=int, default=8, help="extractions of each study")
    parser.add_argument("--frames", type=int, default=48, help="frames per cine")
    parser.add_argument("--n_clips", type=int, nargs="+", default=[16, 4])
    parser.add_argument("--starts", nargs="+", default=["modulo", "independent"])
    parser.add_argument("--size", default=demo.SIZE)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        weights = demo.make_demo(Path("."), args.train, args.frames)
        bar = partial(progress, desc="new studies", unit="study")
        phantom.make_cohort("new", args.studies, seed=1, progress=bar, frames=args.frames)
        for n_clips in args.n_clips:
            for starts in args.starts:
                rows += measure(args, weights, n_clips, starts)
    report = {"machine": describe(args.device), "options": vars(args), "rows": rows}
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


def measure(args, weights, n_clips, starts):
    """Rows of results of one way of drawing clips; each is printed when it is complete."""
    options = ["--weights", weights, "--size", args.size, "--n_clips", n_clips, "--starts", starts]
    options += ["--device", args.device]
    name, rows = f"{n_clips}_{starts}", []
    run(extract.main, ["videos", "--out", f"emb_{name}", *options])
    for task in LABELS:
        run(ef.main, ["train", "--task", task, "--embedding_path", f"emb_{name}", "--run_id", name,
                      "--device", args.device])  # fmt: skip
    tables = {task: [] for task in LABELS}
    for seed in range(1, args.seeds + 1):
        run(extract.main, [Path("new", "videos"), "--out", f"new_{name}_{seed}", "--sampling_seed",
                           seed, *options])  # fmt: skip
        line = ["predict", "--spread", "clips", "--embedding_path", f"new_{name}_{seed}"]
        line += ["--device", args.device]
        for task, results in tables.items():
            run(ef.main, [*line, "--model_name", f"{task}_{name}", "--out", "p.csv"])
            results.append(pd.read_csv("p.csv").set_index("eid").sort_index())
            os.unlink("p.csv")
    for task, results in tables.items():
        row = dict(n_clips=n_clips, starts=starts, label=LABELS[task])
        row |= coverage(results, LABELS[task], " [%]" if task == "ef" else "")
        print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
                        for k, v in row.items()), flush=True)  # fmt: skip
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
