"""Study-level training and prediction against the published method: python benchmarks/train.py

A seeded cohort of random clip embeddings, written three times: as the published scripts do (one
HDF5 group per video), as EchoFocus does (one array per study), and packed. The published method
runs one study at a time through torch's TransformerEncoder in fp32, read from the groups. Ours is
the program's loop, read from the pack. The methods alternate over parts of the cohort, so that
other load affects them equally. Bounds: FLOPs at the rate of matrix products, and a plain
sequential read of the same bytes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import describe, matmul_rate, synchronise
from echofocus_core.base.console import progress
from echofocus_core.base.options import Settings
from echofocus_core.study.loop import (
    LoopContext,
    plan_batches,
    read_batches,
    run_studies,
    train_steps,
)
from echofocus_core.study.network import StudyModel
from echofocus_core.study.outputs import Outputs
from echofocus_core.video.store import FileRecord, open_folder, open_store, write_study

ROOT = Path(__file__).resolve().parent.parent
LABELS = [f"label{i}" for i in range(22)]
STEP = 128  # studies an optimiser step, as the released CHD model
CLIP_DROPOUT = 0.5


def make_cohort(folder, studies):
    """Write embeddings in both layouts, a label table and a config."""
    rng, rows = np.random.default_rng(0), []
    (folder / "published").mkdir()
    (folder / "ours").mkdir()
    for i in progress(range(studies), desc="cohort", unit="study"):
        eid, n = f"{10000 + i}", int(rng.integers(20, 91))
        bag = rng.standard_normal((n, 16, 768), dtype=np.float32)
        names = [f"{eid}_{k:03}.avi" for k in range(n)]
        with h5py.File(folder / "published" / f"{eid}_trim_embed.hdf5", "w") as f:
            for name, video in zip(names, bag, strict=True):
                f[f"lab-share/site/{eid}_trim/{name}/emb"] = video
        videos = {
            name: (np.arange(16), video[None]) for name, video in zip(names, bag, strict=True)
        }
        files = dict.fromkeys(names, FileRecord())
        write_study(folder / "ours" / f"{eid}.hdf5", videos, {"clip_len": 16}, files)
        rows.append([f"P{i}", eid, *(rng.random(len(LABELS)) < 0.3).astype(int)])
    pd.DataFrame(rows, columns=["pid", "eid", *LABELS]).to_csv(folder / "labels.csv", index=False)
    task = {"task_labels": LABELS, "label_path": "labels.csv", "type": "binary"}
    datasets = {name: {"embedding_path": name} for name in ("published", "ours")}
    (folder / "config.json").write_text(json.dumps({"task": {"chd": task}, "dataset": datasets}))
    pd.DataFrame(rows)[1].to_csv(folder / "eids.txt", index=False, header=False)
    return [row[1] for row in rows]


# ---------------------------------------------------------------------------- the published method


class Published(nn.Module):
    """torch's layers under the published names; one study at a time."""

    def __init__(self, depth, kind):
        super().__init__()
        layer = nn.TransformerEncoderLayer(768, 6, 768, 0.2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.ff = nn.Linear(768, len(LABELS))
        self.kind = kind
        if kind == "query":
            self.query_token = nn.Parameter(torch.randn(1, 1, 768) * 0.02)

    def forward(self, x):  # (1, N, 768)
        if self.kind == "query":
            return self.ff(self.encoder(torch.cat([self.query_token, x], 1))[:, 0])
        return self.ff(self.encoder(x).mean(1))


def published_read(folder, eid):
    videos = []
    with h5py.File(folder / "published" / f"{eid}_trim_embed.hdf5") as f:
        f.visititems(lambda name, node: videos.append(node[:]) if name.endswith("/emb") else None)
    return torch.from_numpy(np.stack(videos))


def published_train(net, optimizer, folder, eids, targets, device):
    net.train()
    for i, eid in enumerate(eids, 1):
        x = published_read(folder, eid).flatten(0, 1)[None].to(device)
        x = x[:, torch.rand(x.shape[1]) >= CLIP_DROPOUT]
        target = torch.tensor(targets[eid], dtype=torch.float32, device=device)[None]
        loss = nn.functional.binary_cross_entropy_with_logits(net(x), target)
        loss.backward()
        loss.item()
        if i % STEP == 0 or i == len(eids):
            optimizer.step()
            optimizer.zero_grad()


def published_predict(net, folder, eids, device):
    net.eval()
    with torch.no_grad():
        return [net(published_read(folder, e).flatten(0, 1)[None].to(device)).cpu() for e in eids]


# ----------------------------------------------------------------------------------------- measure


class Ways:
    """Times several methods alternately over parts of the cohort."""

    def __init__(self, eids, device, parts=3):
        self.parts, self.device = np.array_split(np.array(eids), parts), device
        self.n = len(eids)

    def time(self, ways):
        """ways: name -> function of a list of study ids; returns name -> seconds."""
        seconds = dict.fromkeys(ways, 0.0)
        for way in ways.values():
            way(list(self.parts[0][:4]))  # warm-up: kernels, page cache
        for part in self.parts:
            for name, way in ways.items():
                synchronise(self.device)
                began = time.perf_counter()
                way(list(part))
                synchronise(self.device)
                seconds[name] += time.perf_counter() - began
        return seconds


def network(depth, kind, device):
    torch.manual_seed(0)
    ours = StudyModel(len(LABELS), kind, depth).to(device)
    published = Published(depth, kind).to(device)
    published.load_state_dict(ours.state_dict())
    return ours, published


def settings_for(precision, tokens):
    dropout = dict(clip_dropout=CLIP_DROPOUT, batch_number=STEP)
    return Settings(precision=precision, batch_tokens=tokens, **dropout)


def measure_compute(folder, store, eids, targets, args, ways):
    """Seconds of training and prediction; also compares the predictions of both methods."""
    ours, published = network(args.depth, args.kind, args.device)
    plain = torch.optim.AdamW(published.parameters(), lr=1e-4, weight_decay=0.01)
    optimizers = {
        p: torch.optim.AdamW(ours.parameters(), lr=1e-4, weight_decay=0.01) for p in args.precision
    }
    common = dict(
        targets=targets, outputs=Outputs.of([str(i) for i in range(ours.n_outputs)], "binary")
    )

    def train(precision):
        settings, optimizer = settings_for(precision, args.tokens), optimizers[precision]
        context = LoopContext(ours, store, settings, **common)
        return lambda part: list(train_steps(context, part, optimizer))

    def predict(precision):
        settings = settings_for(precision, args.tokens)
        return lambda part: run_studies(ours, store, part, settings)

    logits = predict("fp32")(eids[:8]).logits
    expected = torch.cat(published_predict(published, folder, eids[:8], args.device)).numpy()
    error = float(np.abs(logits - expected).max() / np.abs(expected).max())
    predicted = ways.time(
        {
            "published": lambda part: published_predict(published, folder, part, args.device),
            **{precision: predict(precision) for precision in args.precision},
        }
    )
    trained = ways.time(
        {
            "published": lambda part: published_train(
                published, plain, folder, part, targets, args.device
            ),
            **{precision: train(precision) for precision in args.precision},
        }
    )
    return predicted, trained, error


def measure_loading(folder, stores, ways, device):
    settings, packed = settings_for("fp32", 4096), stores["packed"]
    net = torch.nn.Linear(1, 1).to(device)

    def ours(store):
        def load(part):
            context = LoopContext(net, store, settings)
            for batch in read_batches(context, plan_batches(context, part, False)):
                batch.tokens.to(device)

        return load

    pack = folder / "ours.packed.h5"

    def plain(part):
        """Read the same number of bytes sequentially."""
        left, buffer = sum(map(packed.size, part)) * 768 * 4, memoryview(bytearray(1 << 22))
        with open(pack, "rb", buffering=0) as f:
            while left > 0 and (n := f.readinto(buffer)):
                left -= n

    def checksums(part):
        """Compute checksums of the same size; the cost does not depend on the values."""
        numbers = np.zeros((max(map(packed.size, part)), 768), np.float32)
        for eid in part:
            zlib.crc32(numbers[: packed.size(eid)])

    published = lambda part: [published_read(folder, e).to(device) for e in part]  # noqa: E731
    stores = {name: ours(store) for name, store in stores.items()}
    others = {"sequential": plain, "checksums": checksums}
    return ways.time({"published": published, **stores, **others})


def flops_of(depth, tokens, d=768):
    """Forward FLOPs of a study with this many clips: per token and layer, 12 d^2 in the linear
    layers (queries, keys, values, output, two of feed-forward) and 4 N d in attention."""
    return depth * tokens * (12 * d**2 + 4 * tokens * d)


def peak_of_training(folder, dataset, args):
    """Peak memory in GB of `echofocus.py train`, one epoch, in a separate process."""
    line = ["train", "--dataset", dataset, "--epoch_lim", "1", "--run_id", f"{time.time_ns()}"]
    line += ["--encoder_depth", str(args.depth), "--transformer_type", args.kind]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "echofocus.py"), *line, "--device", args.device],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"echofocus.py {' '.join(line)} failed")
    return usage.ru_maxrss / 1e6


def pack(folder):
    line = [sys.executable, str(ROOT / "echofocus.py"), "pack", "--dataset", "ours"]
    subprocess.run(line, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--studies", type=int, default=300)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--kind", default="standard", choices=("standard", "query"))
    parser.add_argument("--tokens", type=int, default=Settings().batch_tokens)
    parser.add_argument("--scan", type=int, nargs="*", default=[], help="more token budgets")
    parser.add_argument("--only_load", action="store_true", help="measure only reading")
    parser.add_argument("--no_memory", action="store_true", help="skip the peak memory runs")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        eids = make_cohort(folder, args.studies)
        args.no_memory |= args.only_load
        peak = {} if args.no_memory else {"unpacked": peak_of_training(folder, "ours", args)}
        pack(folder)
        if not args.no_memory:
            peak["packed"] = peak_of_training(folder, "ours", args)
        table = measure(folder, eids, args)
    table["peak_gb"] = peak
    print("peak memory of training: " + ", ".join(f"{k} {v:.2f} GB" for k, v in peak.items()))
    if args.json:
        Path(args.json).write_text(json.dumps(table, indent=2))


def measure(folder, eids, args):
    """Measure and print everything except memory; returns the results."""
    stores = {
        "unpacked": open_folder(folder / "ours"),
        "packed": open_store(folder / "ours"),
    }
    labels = pd.read_csv(folder / "labels.csv", dtype={"eid": str}).set_index("eid")
    targets = dict(zip(labels.index, labels[LABELS].to_numpy(float), strict=True))
    rate = {
        "fp32": matmul_rate(args.device, torch.float32),
        "bf16": matmul_rate(args.device, torch.bfloat16),
    }
    args.precision = [p for p in rate if rate[p] > rate["fp32"] / 10]
    if "bf16" not in args.precision:
        print("bf16 is emulated here: not measured")
    tokens = np.mean([stores["packed"].size(e) for e in eids])
    size = tokens * 768 * 4
    flops = {
        "predict": flops_of(args.depth, tokens),
        "train": 3 * flops_of(args.depth, tokens * (1 - CLIP_DROPOUT)),
    }
    print(describe(args.device))
    print(
        f"matmul {rate['fp32'] / 1e9:.0f} GFLOP/s fp32, {rate['bf16'] / 1e9:.0f} bf16; "
        f"{len(eids)} studies, {tokens:.0f} clips and {size / 1e6:.2f} MB a study on average; "
        f"{flops['predict'] / 1e9:.2f} GFLOP to predict one, {flops['train'] / 1e9:.2f} to train; "
        f"{args.kind}, depth {args.depth}, {args.tokens} clips a batch, padding 0"
    )
    ways = Ways(eids, args.device)
    loading = measure_loading(folder, stores, ways, args.device)
    predicted, trained, error = {}, {}, np.nan
    if not args.only_load:
        measured = measure_compute(folder, stores["packed"], eids, targets, args, ways)
        predicted, trained, error = measured
    rows, ratios = [], {}
    for what, seconds in (("predict", predicted), ("train", trained)):
        for name, value in seconds.items():
            each = value / len(eids)
            used = flops[what] / each / rate["bf16" if name == "bf16" else "fp32"]
            row = {"what": what, "way": name, "studies/s": 1 / each, "of matmul rate": used}
            rows.append(row | {"ratio": seconds["published"] / value})
            if name != "published":
                ratios[f"{what}_{name}"] = seconds["published"] / value
    for name, value in loading.items():
        row = {"what": "load", "way": name, "studies/s": len(eids) / value}
        row |= {"GB/s": size * len(eids) / value / 1e9, "ratio": loading["published"] / value}
        rows.append(row)
    ratios["load_packed"] = loading["published"] / loading["packed"]
    ratios["load_unpacked"] = loading["published"] / loading["unpacked"]
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.3g}".format, na_rep=""))
    print(f"predictions differ from the published method's by {error:.1e} of the largest")
    print("ratios " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()))
    scan = {}
    for budget in args.scan:
        args.tokens = budget
        _, trained, _ = measure_compute(folder, stores["packed"], eids, targets, args, ways)
        scan[budget] = {k: len(eids) / v for k, v in trained.items()}
        print(
            f"{budget} clips a batch: " + ", ".join(f"{k} {v:.1f}" for k, v in scan[budget].items())
        )
    return {"machine": describe(args.device), "rows": rows, "ratios": ratios, "scan": scan}


if __name__ == "__main__":
    main()
