"""Train the video encoder on labelled videos: `train.py --cohort C --data_dir D --output_dir O`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, not embed/

from echofocus_core.encoder.train import program  # noqa: E402

if __name__ == "__main__":
    program()
