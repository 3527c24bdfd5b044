"""Write an end-to-end model in the published format: `end_to_end.py export FOLDER FILE.pt`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, not embed/

from echofocus_core.study.end_to_end import program  # noqa: E402

if __name__ == "__main__":
    program()
