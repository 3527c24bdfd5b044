"""Integrated gradients against the published method: python benchmarks/explain.py

Seconds per study and convergence error, for one label and for all, on one study of clip embeddings.
The published method is Captum's IntegratedGradients with 64 right-endpoint Riemann steps, one label
and one step at a time. Ours is `study.attribution.integrated_gradients`. Shapley values of the
videos are timed too; their error is the largest standard error as a share of the label's summed
absolute scores. All alternate, so that other load affects them equally. The trained model is
trained here on planted patterns, in a minute; the random model is untrained.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import describe, timed
from echofocus_core.base.options import Settings
from echofocus_core.study import attribution
from echofocus_core.study.network import StudyModel

D, LABELS = 768, 22


def make_studies(n, videos, clips, seed):
    """(studies of normal clip embeddings with a planted pattern for each label, labels)."""
    patterns = np.random.default_rng(0).standard_normal((LABELS, D))
    rng, bags = np.random.default_rng(seed), []
    labels = rng.random((n, LABELS)) < 0.3
    for present in labels:
        bag = rng.standard_normal((int(rng.integers(*videos)), clips, D))
        for label in np.flatnonzero(present):
            bag[rng.integers(len(bag))] += 0.5 * patterns[label]
        bags.append(torch.from_numpy(bag.astype(np.float32)))
    return bags, torch.from_numpy(labels).float()


def make_model(depth, device, trained):
    torch.manual_seed(0)
    net = StudyModel(LABELS, depth=depth).to(device)
    if trained:
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3 / depth)
        bags, labels = make_studies(512, (4, 9), 4, seed=1)
        for start in [*range(0, 512, 32)] * 3:
            batch = [bag.flatten(0, 1).to(device) for bag in bags[start : start + 32]]
            logits, _ = net(torch.cat(batch), [len(bag) for bag in batch])
            F.binary_cross_entropy_with_logits(
                logits, labels[start : start + 32].to(device)
            ).backward()
            optimizer.step()
            optimizer.zero_grad()
    return net.eval().requires_grad_(False)


def compare(net, bag, columns, repeats):
    """Seconds and largest error of both methods for some columns, and the ratio, as a dict."""
    V = len(bag)
    tokens = bag.flatten(0, 1).to(attribution.device_of(net))
    start, objectives = torch.zeros_like(tokens), attribution.Objectives(columns)

    def shapley(net, tokens, start, settings, objectives, V):
        """Scores, and the largest standard error of each label as a share of its sum."""
        empty, findings = torch.zeros(net.n_outputs), np.ones(len(columns), bool)
        objectives = attribution.Objectives(columns, findings=findings)
        scores, errors = attribution.shapley_values(net, bag, settings, objectives, empty)
        return scores, errors.max(1) / np.abs(scores).sum(1)

    ways = {
        "published": (
            attribution.published_gradients,
            Settings(explain_method="riemann_right", explain_steps=64, batch_size=1),
        ),
        "ours": (attribution.integrated_gradients, Settings()),
        "shapley": (shapley, Settings(explain_method="shapley")),
    }
    seconds, errors = {name: [] for name in ways}, {}

    def run(name):
        way, settings = ways[name]
        errors[name] = float(way(net, tokens, start, settings, objectives, V)[1].max())

    run("ours")  # warm-up
    for _ in range(repeats):
        for name in ways:
            seconds[name].append(timed(lambda name=name: run(name), tokens.device))
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    ratio = medians["published"] / medians["ours"]
    shapley_ratio = medians["shapley"] / medians["ours"]
    return {"seconds": medians, "error": errors, "ratio": ratio, "shapley_ratio": shapley_ratio}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--videos", type=int, default=53, help="videos per study, 16 clips each")
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    device = torch.device(args.device)
    print(f"{describe(device)}; a study of {args.videos} videos of 16 clips, depth {args.depth}")
    (bag,), _ = make_studies(1, (args.videos, args.videos + 1), 16, seed=2)
    results = {}
    for kind in ("trained", "random"):
        net = make_model(args.depth, device, kind == "trained")
        for name, columns in (("one_label", [0]), ("all_labels", list(range(LABELS)))):
            result = compare(net, bag, columns, args.repeats if name == "one_label" else 1)
            results[f"{kind}/{name}"] = result
            ways = "; ".join(
                f"{way} {result['seconds'][way]:.2f} s, error {result['error'][way]:.2%}"
                for way in result["seconds"]
            )
            print(f"{kind:8} {name:10} {ways}; {result['ratio']:.1f}x", flush=True)
            print(f"shapley takes {result['shapley_ratio']:.2f} times as long as ours", flush=True)
    if args.json:
        names = ("one_label", "all_labels")
        report = {
            "machine": describe(device),
            "ratios": {n: results[f"trained/{n}"]["ratio"] for n in names},
            "error": max(results[f"trained/{n}"]["error"]["ours"] for n in names),
            "random": {
                "ratios": {n: results[f"random/{n}"]["ratio"] for n in names},
                "error": max(results[f"random/{n}"]["error"]["ours"] for n in names),
            },
            "results": results,
        }
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
