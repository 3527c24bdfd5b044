"""PanEcho's 40 outputs for a folder of exams: `panecho.py predict FOLDER`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, not embed/

from echofocus_core.video.panecho import program  # noqa: E402

if __name__ == "__main__":
    program()
