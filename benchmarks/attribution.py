"""Ways to attribute an answer to videos, on planted findings: python benchmarks/attribution.py

The phantoms are clip embeddings: decoding so many videos would take hours. A study has 6 to 24
videos of several views, 4 clips each. A finding is a pattern in one video, in two redundant videos,
or in none; an ejection fraction (EF) is a direction in the videos of two views. A small set
transformer learns both, once per seed. The ways are compared on studies that it has not seen:

    first            share of studies whose planted video has the largest score
    both in three    share of studies whose two redundant videos are among the first three
    deletion         area under the finding's probability while videos are removed, largest score
                     first, less that in random order (lower is better)
    insertion        the same while videos are added (higher is better)
    false support    the largest score in a study without the finding, mean: of Shapley values in
                     its probability (0.01 is a point), of the other ways in log-odds
    stability        Spearman correlation of a study's scores between models of different seeds
    sign             share of studies in which the summed scores of the EF's videos have the sign of
                     the EF's distance from the training mean (studies at least 10 points from it)
    EF at start      the answers from which the scores start, in percent: least and greatest
    seconds          of one core per study, for both labels

Then, without planted findings, on networks of the published shapes with rule-made weights, for all
labels of a study of 23 videos, 2 clips each:

    effect           decrease of an output by removing the three videos with the largest scores,
                     divided by its mean absolute change without three random videos: the median
"""

import argparse
import json
import sys
import time
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers import by_rule, normal, recorded

from benchmarks.machine import describe
from echofocus_core.base.options import Settings
from echofocus_core.study import attribution as at
from echofocus_core.study.network import StudyModel
from echofocus_core.study.outputs import Outputs

WIDTH, CLIPS, VIEWS = 192, 4, 8
EF_VIEWS = (0, 1)
EF_MEAN, EF_SD, EF_LOW, EF_HIGH = 55, 12, 15, 80  # in percent
STRENGTHS = (0.45, 0.22)  # of the planted patterns: every model learns the first
GRID = np.linspace(0, 1, 11)
RANDOM_ORDERS = 5
WAYS = {
    "integrated gradients from zeros": {"baseline": "zero"},
    "from the training mean clip": {"baseline": "mean"},
    "from the study's mean clip": {"baseline": "study"},
    "leave-one-out": {"explain_method": "leave_one_out"},
    "Shapley from the mean answer in training": {"explain_method": "shapley"},
    "Shapley without training means": {"explain_method": "shapley"},
}


class Phantoms:
    """Draws studies of simulated clip embeddings."""

    def __init__(self, seed, strength):
        world = np.random.default_rng(0)  # the same for all seeds
        self.offset = world.normal(0, 1, WIDTH)  # the mean clip is far from zero
        self.views = world.normal(0, 0.7, (VIEWS, WIDTH))
        self.pattern, self.direction = strength * world.normal(size=(2, WIDTH))
        self.rng = np.random.default_rng(seed)

    def draw(self, n_planted):
        """A study: embeddings (V, C, D), places of the planted videos and those of the EF, EF."""
        rng, V = self.rng, int(self.rng.integers(6, 25))
        views = rng.integers(VIEWS, size=V)
        views[0] = rng.choice(EF_VIEWS)
        shows_ef = np.isin(views, EF_VIEWS)
        ef = float(np.clip(rng.normal(EF_MEAN, EF_SD), EF_LOW, EF_HIGH))
        videos = self.offset + rng.normal(0, 0.3, WIDTH) + self.views[views]
        videos += rng.normal(0, 0.4, (V, WIDTH))
        videos += shows_ef[:, None] * (ef - EF_MEAN) / EF_SD * self.direction
        bag = videos[:, None] + rng.normal(0, 0.7, (V, CLIPS, WIDTH))
        planted = rng.choice(V, n_planted, replace=False)
        bag[planted] += rng.uniform(0.7, 1.3, (n_planted, CLIPS, 1)) * self.pattern
        return SimpleNamespace(
            bag=bag.astype(np.float32), planted=planted, shows_ef=np.flatnonzero(shows_ef), ef=ef
        )


def answers_of(net, bags):
    """Outputs (S, T) of studies (V, C, D)."""
    tokens = [torch.as_tensor(bag).flatten(0, 1) for bag in bags]
    return net(torch.cat(tokens), [len(x) for x in tokens])[0]


def train(seed, strength, n=600, epochs=6):
    """A network with outputs finding (log-odds) and EF (standardised), and its training means."""
    phantoms, rng = Phantoms((1, seed), strength), np.random.default_rng(seed)
    studies = [phantoms.draw((0, 1, 0, 2)[i % 4]) for i in range(n)]
    truths = [[len(x.planted) > 0, (x.ef - EF_MEAN) / EF_SD] for x in studies]
    truths = torch.tensor(truths, dtype=torch.float32)
    torch.manual_seed(seed)
    net = StudyModel(2, width=WIDTH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(epochs):
        for step in np.array_split(rng.permutation(n), n // 16):
            finding, ef = answers_of(net, [studies[i].bag for i in step]).T
            y = truths[step].T
            (F.binary_cross_entropy_with_logits(finding, y[0]) + F.mse_loss(ef, y[1])).backward()
            optimizer.step()
            optimizer.zero_grad()
    net.eval().requires_grad_(False)
    clip_mean = torch.from_numpy(np.mean([x.bag.mean((0, 1)) for x in studies], 0))
    outputs = Outputs.of(["finding", "EF"], {"finding": "binary", "EF": "regression"})
    mean_answer = torch.from_numpy(
        outputs.mean(answers_of(net, [x.bag for x in studies]), {})
    ).float()
    return SimpleNamespace(net=net, clip_mean=clip_mean, mean_answer=mean_answer, outputs=outputs)


def explain(model, bag, way):
    """Scores (T, V) and baseline answers (T,) of all labels, and the seconds of the scores."""
    settings = Settings(**WAYS[way])
    if way.endswith("without training means"):
        model = SimpleNamespace(**vars(model) | {"mean_answer": None})
    clip = at.clip_baseline(model, bag, settings)
    began = time.process_time()
    baseline, _ = at.baseline_answer(model, bag, settings, clip)
    findings = np.array([x == "binary" for x in model.outputs.kind_of.values()])
    objectives = at.Objectives(list(range(model.net.n_outputs)))
    objectives.findings = findings if settings.explain_method == "shapley" else None
    result = at.attribute_clips(model.net, bag, settings, objectives, clip, baseline)
    return result.scores.sum(2), baseline.numpy(), time.process_time() - began


def area(net, bag, order):
    """Area under the finding's probability with the first 1, ..., V videos of an order."""
    V = len(bag)
    answers = answers_of(net, [bag[np.sort(order[:n])] for n in range(1, V + 1)])[:, 0]
    return np.trapezoid(np.interp(1 + GRID * (V - 1), range(1, V + 1), answers.sigmoid()), GRID)


def planted_rows(model, studies, seed):
    """A row for each study and way."""
    rows, rng = [], np.random.default_rng(seed)
    for i, study in enumerate(studies):
        V, net, present = len(study.bag), model.net, len(study.planted)
        random = [area(net, study.bag, rng.permutation(V)) for _ in range(RANDOM_ORDERS * present)]
        for way in WAYS:
            scores, baseline, seconds = explain(model, study.bag, way)
            order = np.argsort(-scores[0], kind="stable")
            row = {"way": way, "study": i, "seed": seed, "scores": scores[0], "seconds": seconds}
            row["EF at start"] = EF_MEAN + EF_SD * baseline[1]
            if present:
                first = set(order[: 2 * present - 1])
                row[("first", "both in three")[present - 1]] = set(study.planted) <= first
                row["insertion"] = area(net, study.bag, order) - np.mean(random)
                row["deletion"] = area(net, study.bag, order[::-1]) - np.mean(random)
            else:
                row["false support"] = scores[0].max()
            if abs(study.ef - EF_MEAN) >= 10:
                row["sign"] = (scores[1][study.shows_ef].sum() > 0) == (study.ef > EF_MEAN)
            rows.append(row)
    return rows


def table_of(rows):
    """The means of all columns by way; stability between the seeds' models."""
    rows = pd.DataFrame(rows)
    means = ["first", "both in three", "deletion", "insertion", "false support", "sign", "seconds"]
    by_way = rows.groupby("way", sort=False)
    table = by_way[means].agg(lambda x: x.dropna().astype(float).mean())
    table["stability"] = by_way.apply(
        lambda part: np.mean([
            spearmanr(a, b).statistic
            for _, scores in part.groupby("study")["scores"]
            for a, b in combinations(scores, 2)
        ]),
        include_groups=False,
    )  # fmt: skip
    return table.join(by_way["EF at start"].agg(["min", "max"]))


def published_rows():
    """Networks of the published shapes with rule-made weights."""
    bag, rng = normal(103, 23, 2, 768), np.random.default_rng(0)
    random = [bag[np.sort(rng.permutation(len(bag))[3:])] for _ in range(20)]
    for name, kind, depth in (("chd", "binary", 1), ("measure", "regression", 5)):
        outputs = Outputs.of(recorded("labels.json")[name], kind)
        net = by_rule(n_outputs=len(outputs.names), depth=depth)
        model = SimpleNamespace(net=net, mean_answer=None, outputs=outputs)
        answer = answers_of(net, [bag])
        chance = (answers_of(net, random) - answer).abs().mean(0)
        for way in WAYS:
            if "the training" in way or "in training" in way:
                continue  # the released models do not hold its means
            scores, _, seconds = explain(model, bag, way)
            rest = [bag[np.sort(np.argsort(-x)[3:])] for x in scores]
            decrease = answer[0] - answers_of(net, rest).diagonal()
            effect = float((decrease / chance).median())
            yield {"model": name, "way": way, "effect": effect, "seconds": seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="models to train")
    parser.add_argument("--studies", type=int, default=20, help="for each seed, with one finding")
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)  # seconds do not depend on other jobs
    report = {"machine": describe("cpu"), "options": vars(args)}
    print(report["machine"], flush=True)
    for strength in STRENGTHS:
        phantoms, rows = Phantoms((2, 0), strength), []
        studies = [phantoms.draw(k) for k in (1, 2) for _ in range(args.studies)]
        studies += [phantoms.draw(0) for _ in range(args.studies // 2)]
        for seed in range(args.seeds):
            model = train(seed, strength)
            finding = answers_of(model.net, [x.bag for x in studies])[:, 0].numpy() > 0
            right = np.mean(finding == [len(x.planted) > 0 for x in studies])
            print(f"strength {strength}, model {seed}: {right:.0%} of the findings are right")
            rows += planted_rows(model, studies, seed)
        table = table_of(rows)
        print(table.to_string(float_format="{:.3g}".format), flush=True)
        report[f"strength {strength}"] = table.reset_index().to_dict("records")
    published = pd.DataFrame(published_rows())
    print(published.to_string(index=False, float_format="{:.3g}".format))
    report["published shapes"] = published.to_dict("records")
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
