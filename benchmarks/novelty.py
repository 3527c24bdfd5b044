"""Warnings by novelty in simulated studies: python benchmarks/novelty.py

A model's training studies have 5 to 40 videos each. The result is the share of new studies with a
warning (novelty above 0.99): ordinary ones with 1 to 100 videos, where 1 % is expected, and
studies of 20 videos that differ.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.machine import describe
from echofocus_core import EMBED_DIM as D
from echofocus_core.study.input_check import UNUSUAL, Novelty
from echofocus_core.video.store import StudyClips

FALLING = 1 / np.sqrt(1 + np.arange(D))
SIZES = (1, 2, 3, 5, 10, 20, 50, 100)  # numbers of videos of ordinary studies
# Standard deviations between studies, and within: (D,) each
SCALES = {
    "all directions alike": (np.full(D, 0.5), np.ones(D)),
    "other directions within a study": (FALLING, 1 / np.sqrt(2 + np.arange(D)[::-1] / 3)),
    "the same directions": (FALLING, FALLING),
    "heavy tails": (FALLING, 2 * FALLING),
}


class Population:
    def __init__(self, name, seed=0):
        self.between, self.within = SCALES[name]
        self.heavy, self.rng = name == "heavy tails", np.random.default_rng(seed)

    def draw(self, V):
        """(V, D): the videos of a study."""
        study, videos = self.rng.normal(size=D), self.rng.normal(size=(V, D))
        if self.heavy:  # Student's t of the whole vector, with 5 and with 4 degrees of freedom
            study *= np.sqrt(5 / self.rng.chisquare(5))
            videos *= np.sqrt(4 / self.rng.chisquare(4, size=(V, 1)))
        return study * self.between + videos * self.within

    def odd(self):
        """Differing studies of 20 videos: name -> (20, D)."""
        one_video = np.concatenate([self.draw(19), 3 * self.draw(1)])
        shift = 0.3 * np.sqrt(1.5)  # of the standard deviation, where all directions are alike
        return {"scaled by 1.3": 1.3 * self.draw(20), "shifted": shift + self.draw(20),
                "one video scaled by 3": one_video}  # fmt: skip


def as_study(videos):
    return StudyClips(videos[:, None].astype(np.float32), [str(i) for i in range(len(videos))])


def shares_with_warning(name, n, trainings, new=100, sizes=SIZES, seed=0):
    """{number of videos, or name of a difference: share with a warning}; n: training studies."""
    population, warned = Population(name, seed), {}
    for _ in range(trainings):
        studies = [population.draw(population.rng.integers(5, 41)) for _ in range(n)]
        novelty = Novelty.of(studies, list(range(n)))
        for i in range(new):
            drawn = {V: population.draw(V) for V in sizes}
            for key, videos in (drawn | (population.odd() if i < 20 else {})).items():
                warned.setdefault(key, []).append(novelty(as_study(videos)) > UNUSUAL)
    return {key: float(np.mean(x)) for key, x in warned.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trainings", type=int, default=20, help="of each population and size")
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    rows = []
    for name in SCALES:
        for n in (25, 60, 400):
            shares = shares_with_warning(name, n, args.trainings if n < 100 else 3)
            text = ", ".join(f"{key}: {100 * x:.1f} %" for key, x in shares.items())
            print(f"{name}, {n} training studies: {text}", flush=True)
            rows.append(dict(population=name, studies=n, warnings=shares))
    report = {"machine": describe("cpu"), "options": vars(args), "rows": rows}
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
