"""Training the encoder: is the loader fast enough? python benchmarks/encoder.py

Phantom cines in the layout of EchoNet-Dynamic. One run measures three rates in images per second:
only the loader (clips from the cache of decoded videos, augmented), only training steps (always the
same batch), and an epoch, in which both run concurrently. An image costs 8.91 GFLOP forward and
twice that backward; the bound is this cost at the machine's rate of matrix products.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import describe, matmul_rate, synchronise
from echofocus_core.base.console import Parser, progress
from echofocus_core.base.world import World
from echofocus_core.encoder import train
from echofocus_core.encoder.cohorts import read_cohort
from echofocus_core.video.cache import ClipSampling, FrameCache
from echofocus_core.video.phantom import phantom_cine, write_video

FLOP = 8.91e9  # per image of 224x224, forward
LINE = "--cohort echonetdynamic --data_dir data --output_dir run --model_name frame_transformer "
LINE += "--arch convnext_tiny --normalization imagenet --fc_dropout 0.25 --augment --rand_init "
LINE += "--max_epochs 2"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def draw(i, frames, side):
    cine = phantom_cine("A4C", 20 + i % 50, False, frames, (side, side), seed=i)
    write_video(f"data/Videos/{i}.avi", cine)


def make_cohort(args):
    """Write args.videos cines for training and eight for validation; at most 64 are distinct."""
    n, distinct = args.videos + 8, min(args.videos + 8, 64)
    with ProcessPoolExecutor(args.workers or None) as pool:
        work = pool.map(partial(draw, frames=args.frames, side=112), range(distinct))
        list(progress(work, desc="phantoms", total=distinct, unit="video"))
    for i in range(distinct, n):
        Path(f"data/Videos/{i}.avi").hardlink_to(f"data/Videos/{i % distinct}.avi")
    table = pd.DataFrame({"FileName": [str(i) for i in range(n)], "EF": 20 + np.arange(n) % 50})
    table["Split"] = ["TRAIN"] * args.videos + ["VAL"] * 8
    table.to_csv("data/FileList.csv", index=False)


def measure(args, precision, device):
    """Images per second as a dict: loader, steps, epoch and bound."""
    parser = Parser()
    train.add_options(parser, train.COMMAND, train.EncoderSettings)
    more = f"--precision {precision} --device {device} --batch_size {args.batch_size} "
    more += f"--size {args.size} --num_workers {args.workers} --output_dir {precision}"
    settings = train.resolve_settings(vars(parser.parse_args(f"{LINE} {more}".split())))
    cache = FrameCache(settings.cache_dir, settings.size)
    cohort = read_cohort(settings.cohort, settings.data_dir, "")
    cohort = train.decode_cohort(cohort, cache, settings, World())
    with contextlib.redirect_stdout(sys.stderr):
        run = train.Run(settings.output_dir, settings, cohort, cohort.folds(0), cache, World())
        run.begin()
    each, names = settings.batch_size, run.names["train"]
    steps = [names[i : i + each] for i in range(0, len(names) - each + 1, each)]
    images = each * settings.clip_len
    sampling = ClipSampling(settings.clip_len, settings.size, settings.sampling_rate, augment=True)
    began = time.perf_counter()
    for videos, clips in run.batches(steps, 1, sampling, 0):  # noqa: B007
        pass
    rates = {"loader": images * len(steps) / (time.perf_counter() - began)}
    run.net.train()
    run.step(videos, videos, clips, 0)  # warms up
    synchronise(device)
    began = time.perf_counter()
    for k in range(args.steps):
        run.step(videos, videos, clips, k)
    synchronise(device)
    rates["steps"] = images * args.steps / (time.perf_counter() - began)
    with contextlib.redirect_stdout(sys.stderr):
        run.one_epoch()
    seconds = run.history[0]["seconds"]
    rates["epoch"] = len(names) * settings.clip_len / seconds
    rate = matmul_rate(device, DTYPES[precision])
    rates["bound"] = rate / (3 * FLOP * (args.size / 224) ** 2)
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--videos", type=int, default=32)
    parser.add_argument("--frames", type=int, default=48, help="frames per cine, 112x112")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2, help="steps timed without the loader")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    print(f"{describe(args.device)}; {args.videos} cines of {args.frames} frames", flush=True)
    results = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        make_cohort(args)
        for precision in args.precision:
            rates = results[precision] = measure(args, precision, torch.device(args.device))
            print(
                f"{precision}: " + ", ".join(f"{k} {v:.3g}" for k, v in rates.items()), flush=True
            )
    if args.json:
        report = {
            "machine": describe(args.device),
            "options": vars(args),
            "images_a_second": results,
        }
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
