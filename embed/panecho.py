"""PanEcho's 40 readings of a folder of exams, one row per study: `panecho.py predict FOLDER`.

The table is what `echofocus.py predict` writes with the same encoder; other options are passed on.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # the repository, not embed/

from echofocus_core.base.console import Parser, run_main  # noqa: E402
from echofocus_core.video.panecho import find_weights  # noqa: E402


def main(argv=None):
    summary = "PanEcho's 40 readings of a folder of exams, one row per study."
    program, example = "python embed/panecho.py", "predict exams --out readings.csv"
    more = "Other options are those of: python echofocus.py predict"
    parser = Parser("predict FOLDER", program, summary, example, epilog=more)
    parser.add_argument("command", choices=["predict"], help="write the readings of each study")
    parser.add_argument(
        "folder", metavar="FOLDER", help="folder of study folders, or of one study's files"
    )
    parser.add_argument(
        "--weights", metavar="FILE", default="panecho", help="as for embed/extract.py"
    )
    parser.add_argument(
        "--out", metavar="FILE", default="", help="table to write [panecho_<folder>.csv here]"
    )
    typed, more = parser.parse_known_args(argv)
    file = find_weights(typed.weights).resolve()
    out = typed.out or f"panecho_{Path(typed.folder).resolve().name}.csv"
    line = [f"--model_name={file}", f"--weights={file}", f"--out={out}", f"--videos={typed.folder}"]
    sys.exit(subprocess.call([sys.executable, ROOT / "echofocus.py", "predict", *line, *more]))


if __name__ == "__main__":
    run_main(main, "embed/panecho.py")
