"""Embeddings in one .npz array compared with a pack: python benchmarks/arrays.py

Random clip embeddings (525,312 x 768 float32, 7,243 studies) are written in both layouts. Each
command then runs on both in turn, each in a process of its own: its median seconds, its peak
memory, and the ratio. The floor is one sequential read of the array.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import Process
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import describe
from echofocus_core.base.files import packed_path

PROGRAM = Path(__file__).resolve().parent.parent / "echofocus.py"


def measure(folder, *line):
    """(seconds, peak memory in GB) of one command."""
    began = time.perf_counter()
    with open(folder / "log.txt", "w") as log:
        command = [sys.executable, PROGRAM, *map(str, line)]
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit((folder / "log.txt").read_text()[-2000:])
    return time.perf_counter() - began, usage.ru_maxrss / 1e6


def write_data(folder, n_rows, n_studies, width):
    """emb.npz and clip_index.npz in folder/array, labels.csv and config.json in folder."""
    rng = np.random.default_rng(0)
    (folder / "array").mkdir()
    array = rng.standard_normal((n_rows, width), np.float32)
    np.savez(folder / "array/emb.npz", embeddings=array)
    study = np.sort(np.concatenate([np.arange(n_studies), rng.integers(n_studies, size=n_rows)]))
    study = study[:n_rows]
    np.savez(folder / "array/clip_index.npz", study_ids=study, patient_ids=study // 2)
    eids = np.unique(study)
    labels = pd.DataFrame({"pid": eids // 2, "eid": eids, "x": rng.integers(2, size=len(eids))})
    labels.to_csv(folder / "labels.csv", index=False)
    os.mkdir(folder / "packed")
    for name in ("emb.npz", "clip_index.npz"):
        os.link(folder / "array" / name, folder / "packed" / name)
    datasets = {
        name: {"embedding_path": f"{name}/emb.npz", "label_path": "labels.csv"}
        for name in ("array", "packed")
    }
    config = {"task": {"x": {"task_labels": ["x"], "type": "binary"}}, "dataset": datasets}
    (folder / "config.json").write_text(json.dumps(config))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=525_312)
    parser.add_argument("--studies", type=int, default=7_243)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(describe("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        writer = Process(target=write_data, args=(folder, args.rows, args.studies, args.width))
        writer.start()  # a process: its memory would count as that of the commands
        writer.join()
        measure(folder, "pack", "--dataset", "packed", "--dtype", "float32")
        assert packed_path(folder / "packed/emb.npz").is_file()
        began, size = time.perf_counter(), 0
        with open(folder / "array/emb.npz", "rb") as f:
            while block := f.read(1 << 24):
                size += len(block)
        print(f"floor: {size / 1e9:.2f} GB read in {time.perf_counter() - began:.1f} s")
        train = ["train", "--task", "x", "--transformer_type", "mean", "--total_epochs", 1]
        lines = {
            "check": ["check", "--task", "x"],
            "train, 1 epoch": train,
            "predict": ["predict", "--task", "x", "--spread", "none"],
        }
        for name, line in lines.items():
            results = {"array": [], "packed": []}
            for i in range(args.repeats):
                for dataset, runs in results.items():
                    options = ["--dataset", dataset]
                    if line[0] != "check":
                        model = f"{dataset}{i}" if line[0] == "train" else "array0"
                        options += ["--model_name", model]
                    runs.append(measure(folder, *line, *options))
            (array, memory), (pack, packed) = (np.median(x, axis=0) for x in results.values())
            print(
                f"{name:16} array {array:.1f} s, {memory:.2f} GB   pack {pack:.1f} s, "
                f"{packed:.2f} GB   ratio {array / pack:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
