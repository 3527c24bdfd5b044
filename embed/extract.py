"""Clip embeddings from a folder of DICOM or video files: `extract.py SOURCE --out DIR`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, not embed/

from echofocus_core.video.extract import program  # noqa: E402

if __name__ == "__main__":
    program()
