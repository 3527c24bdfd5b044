"""All steps on phantoms and a real cine, with the public commands."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from echofocus_core.base.console import EXTRACT, INSTALLED, PROGRAM, UserError, progress
from echofocus_core.base.figures import new_figure, save_figure
from echofocus_core.base.files import begins, output_path
from echofocus_core.report.display import interval_text
from echofocus_core.study.config import MODELS
from echofocus_core.video import panecho

SETTINGS = {"batch_number": 8, "epoch_lim": 20}
EF = {"task_labels": ["EF"], "units": {"EF": "%"}, "type": "regression", "label_path": "labels.csv"}
DEFECT = {"task_labels": ["VSD"], "type": "binary", "label_path": "labels.csv"}
PHANTOMS = {"embedding_path": "embeddings", "video_base_path": "videos"}
CONFIG = {
    "task": {
        "ef": EF | {"settings": SETTINGS | {"learning_rate": 3e-4}},
        "defect": DEFECT | {"settings": SETTINGS | {"learning_rate": 1e-4}},
    },
    "dataset": {"phantoms": PHANTOMS | {"video_subdir_format": "{echo_id}"}},
}
# How the demo's config and tables begin.
DEMO_FILES = r'\{\s+"task": \{\s+"ef": |pid,eid,EF,VSD\s|eid,video,shows_defect\s'
SIZE = 64  # pixels: takes a third of the time of 112
COMMANDS = (
    "embed/extract.py videos --out embeddings {extraction}",
    "echofocus.py train --task ef",
    "echofocus.py train --task defect",
    "echofocus.py evaluate --task ef",
    "echofocus.py evaluate --task defect",
    "echofocus.py predict --task ef --videos real {extraction} --out real.csv",
    "echofocus.py embed --task ef --dataset phantoms",
    "echofocus.py explain --task defect --page",
)


def run_demo(studies):
    """Run and print the public commands on phantoms and a real DICOM cine, in ./demo."""
    folder = Path("demo")
    weights = shlex.quote(make_demo(folder, studies))
    for command in COMMANDS:
        line = command.format(extraction=f"--weights {weights} --size {SIZE} --n_clips 1")
        installed = line.replace("embed/extract.py", EXTRACT).replace("echofocus.py", PROGRAM)
        print(f"\n$ {installed if INSTALLED else f'python ../{line}'}", flush=True)
        script, *options = shlex.split(line)
        program = Path(__file__).resolve().parents[2] / script
        if not program.is_file():  # installed by pip
            program = Path(sys.executable).with_name("echofocus-extract")
        if subprocess.run([sys.executable, program, *options], cwd=folder).returncode:
            raise UserError(f"the demo stopped: {line} failed (see above)")
    summarise_demo(folder)


def make_demo(folder, studies, frames=16):
    """Write phantoms, a real cine and a config; returns the value for --weights."""
    import pydicom

    from echofocus_core.video import decode as video
    from echofocus_core.video import phantom

    for name in ("config.json", "labels.csv", "findings.csv"):
        output_path(folder / name, "file of the demo", begins(DEMO_FILES))
    print(f"making {studies} phantom studies in ./{folder}")
    bar = partial(progress, desc="phantoms", unit="study")
    phantom.make_cohort(folder, studies, progress=bar, frames=frames)
    real = folder / "real" / "sonosite"  # an echocardiogram that comes with pydicom
    real.mkdir(parents=True, exist_ok=True)
    shutil.copy(pydicom.examples.get_path("ybr_color"), real / "cine.dcm")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    if panecho.DOWNLOADED.is_file():
        print(f"encoder weights: the released ones, from {panecho.DOWNLOADED}")
        return os.path.relpath(panecho.DOWNLOADED, folder)
    if panecho.weights_path().is_file():
        print("encoder weights: the released ones, from torch.hub's cache")
        return "panecho"
    print("encoder weights: RANDOM (the released weights are not downloaded)")
    clips = []
    for path in sorted(folder.glob("videos/*/*.avi"))[:24]:
        sampled, *_ = video.read_clips(path, video.Sampling(n_clips=1, size=SIZE))
        frames = torch.from_numpy(sampled.frames[sampled.index[0]])
        clips.append(panecho.normalise(frames.permute(3, 0, 1, 2), torch.arange(3)[:, None]))
    panecho.save_untrained(folder / "untrained.pt", clips)
    return "untrained.pt"


def summarise_demo(folder):
    """Print the results of the demo, those of guessing, and the files to look at."""
    models, ids = folder / MODELS, {"eid": str, "Echo_ID": str}
    split = pd.read_csv(models / "ef" / "split.csv", dtype=str).set_index("eid")["fold"]
    labels = pd.read_csv(folder / "labels.csv", dtype=ids).set_index("eid")
    guess = labels["EF"].reindex(split.index[split == "train"]).median()
    ef = pd.read_csv(models / "ef" / "saveout_test_phantoms.csv", dtype=ids)
    defect = pd.read_csv(models / "defect" / "saveout_test_phantoms.csv", dtype=ids)
    metrics = pd.read_csv(models / "defect" / "metrics_test_phantoms.csv").set_index("metric")
    auroc = metrics.loc["auroc"]
    videos = pd.read_csv(models / "defect" / "explanation_test_phantoms.shapley.csv", dtype=ids)
    videos = videos.merge(pd.read_csv(folder / "findings.csv", dtype=ids), on=["eid", "video"])
    videos = videos[videos.groupby("eid")["shows_defect"].transform("max") == 1]
    top = videos[videos["rank"] == 1]["shows_defect"]
    plot_demo(ef, defect, videos, folder / "demo")
    error, guessed = ((x - ef["EF_Correct"]).abs().median() for x in (ef["EF_Predict"], guess))
    interval = interval_text(auroc["ci_low"], auroc["ci_high"])
    print(
        f"\nEjection fraction, {len(ef)} test studies: median error {error:.1f} % (guessing the "
        f"training median: {guessed:.1f} %)\nSeptal defect, {len(defect)} test studies: AUROC "
        f"{auroc['value']:.2f} ({interval + '; ' * bool(interval)}guessing: 0.5)\n"
        f"The top video of a study with a defect shows it in {top.sum()} of {len(top)} studies "
        f"(a random video: {videos['shows_defect'].mean():.0%})"
    )
    print(f"""
Look at, in {folder}:
  trained_models/defect/explanation_test_phantoms.shapley/index.html  the videos of each answer
  demo.png                                                     these results
  trained_models/ef/scatter_plots_test_phantoms.png            predicted against true
  trained_models/defect/explanation_test_phantoms.shapley.csv  every video in every answer
  real.csv                                                     the real echocardiogram
  trained_models/ef/embeddings_phantoms_ef.h5                  one 768-vector per study""")


def plot_demo(ef, defect, videos, path):
    """Plot ejection fractions, the defect's ROC, and scores of videos with and without a defect."""
    from echofocus_core.report.curves import draw_roc
    from echofocus_core.study.kinds.binary import BinaryOutcome

    figure, (left, middle, right) = new_figure(1, 3, figsize=(9, 3), layout="constrained")
    left.axline((45, 45), slope=1, color="grey", lw=0.8)
    left.scatter(ef["EF_Correct"], ef["EF_Predict"], s=14)
    left.set(xlabel="true ejection fraction [%]", ylabel="predicted [%]")
    draw_roc(middle, BinaryOutcome("VSD", defect["VSD_Correct"], defect["VSD_Predict"]))
    middle.set_title("septal defect")
    for k, (shown, colour) in enumerate(((1, "C3"), (0, "C0"))):
        part = videos[videos["shows_defect"] == shown]
        spread = np.linspace(-0.2, 0.2, len(part))
        right.scatter(k + spread, part["score"], s=14, color=colour)
    right.axhline(0, color="grey", lw=0.8)
    right.set_xticks([0, 1], ["videos that show\nthe defect", "other videos\nof these studies"])
    right.set(ylabel="score [points]", xlim=(-0.6, 1.6))
    save_figure(figure, path)
