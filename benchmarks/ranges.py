"""Coverage of the 90 % ranges of answers, simulated: python benchmarks/ranges.py

A study transformer is trained on simulated studies of V videos of C clips: the first video carries
a finding and a measurement, and clips vary within a video. The result is the share of other
extractions (the same videos, new clips) whose answer is in the range of the first.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.machine import describe
from echofocus_core import EMBED_DIM as D
from echofocus_core.base.options import Settings
from echofocus_core.study.config import Record
from echofocus_core.study.input_check import InputReport
from echofocus_core.study.loop import run_studies
from echofocus_core.study.models import LoadedModel
from echofocus_core.study.network import StudyModel
from echofocus_core.study.outputs import Outputs
from echofocus_core.study.predictions import half_widths_of
from echofocus_core.video.store import StudyClips

CELLS = [(1, 2), (1, 4), (1, 16), (5, 2), (5, 4), (5, 16), (20, 2), (20, 4)]  # videos, clips
FINDING, MEASUREMENT = np.linalg.qr(np.random.default_rng(0).normal(size=(D, 2)))[0].T


class SimulatedStudies(dict):
    """A store: study id -> embeddings (V, C, D)."""

    def read(self, eid, rng=None):
        return StudyClips(self[eid], [str(i) for i in range(len(self[eid]))])

    def size(self, eid):
        return self[eid].shape[0] * self[eid].shape[1]


def draw_videos(rng, V, finding, measurement):
    """(V, 1, D): the mean embeddings of a study's videos."""
    videos = rng.normal(size=(V, 1, D))
    videos[0] += 8 * finding * FINDING + 6 * measurement * MEASUREMENT
    return videos


def draw_clips(rng, videos, C):
    return (videos + rng.normal(size=(len(videos), C, D))).astype(np.float32)


def train(V, C, steps, n=400):
    torch.manual_seed(0)
    rng = np.random.default_rng(V * 100 + C)
    truths = np.column_stack([rng.integers(0, 2, n), rng.normal(size=n)])
    studies = np.stack([draw_clips(rng, draw_videos(rng, V, *x), C) for x in truths])
    net = StudyModel(2).train()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, weight_decay=0.01)
    for _ in range(steps):
        batch = rng.choice(n, 16, replace=False)
        out, _ = net(torch.from_numpy(studies[batch].reshape(-1, D)), [V * C] * 16)
        y = torch.from_numpy(truths[batch]).float()
        loss = F.binary_cross_entropy_with_logits(out[:, 0], y[:, 0]) + F.mse_loss(
            out[:, 1], y[:, 1]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def coverage(V, C, studies=100, extractions=8, steps=250):
    """(coverage, its standard error over studies), each (2,): of the finding's log-odds and of the
    measurement."""
    net, rng = train(V, C, steps), np.random.default_rng(99)
    store = SimulatedStudies()
    for i in range(studies):
        truth = i % 2, rng.normal()
        videos = draw_videos(rng, V, *truth)
        for k in range(extractions):
            store[i, k] = draw_clips(rng, videos, C)
    settings = Settings(spread="clips")
    model = LoadedModel(
        Path("m"), net, "t", Outputs.of("ab", "binary"), None, Record(labels=["a", "b"]), {}
    )
    answers = run_studies(net, store, list(store), settings).logits.reshape(studies, extractions, 2)
    firsts = run_studies(net, store, [(i, 0) for i in range(studies)], settings)
    report = InputReport(modulo=dict.fromkeys(store, False))
    half_widths = half_widths_of(model, store, firsts, settings, report)
    inside = (abs(answers[:, 1:] - answers[:, :1]) <= half_widths[:, None]).mean(1)
    return inside.mean(0), inside.std(0) / np.sqrt(studies)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--studies", type=int, default=100)
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    rows = []
    for V, C in CELLS:
        began = time.perf_counter()
        share, error = coverage(V, C, args.studies, steps=250 if V * C <= 40 else 120)
        rows.append(dict(videos=V, clips=C, coverage=share.tolist(), error=error.tolist()))
        text = f"{V} videos of {C} clips: {share.round(3)} +- {error.round(3)}"
        print(f"{text}, {time.perf_counter() - began:.0f} s", flush=True)
    report = {"machine": describe("cpu"), "options": vars(args), "rows": rows}
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
