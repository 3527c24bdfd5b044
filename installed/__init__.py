"""`import echofocus` where EchoFocus is installed: the program itself, out of a private folder.

The tree lies in `_tree/` beside this file, so that its rooms (common, embed, report) are no names
of the site's. That folder is on the import path only while the program is imported. The rooms then
stay loaded under their names: a process has these, or others that are called so.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def load(tree):
    """Make `echofocus` the module in `tree`/echofocus.py. Raises ImportError."""
    for room in ("common", "embed", "report"):
        module = sys.modules.get(room)
        file = getattr(module, "__file__", None) or ""
        if module and tree not in Path(file).resolve().parents:
            raise ImportError(
                f"another module called '{room}' ({file or 'a namespace'}) is loaded in this "
                "process; import echofocus in a process of its own"
            )
    spec = spec_from_file_location("echofocus", tree / "echofocus.py")
    sys.modules["echofocus"] = program = module_from_spec(spec)
    sys.path.insert(0, str(tree))
    try:
        spec.loader.exec_module(program)
    finally:
        sys.path.remove(str(tree))


here = Path(__file__).resolve().parent
installed = (here / "_tree").is_dir()
load(here / "_tree" if installed else here.parent)  # else the clone that `pip install -e` links to
