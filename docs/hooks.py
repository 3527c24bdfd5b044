"""What mkdocs adds to the pages of docs/: files of the repository, options and tutorials.

The pages that are generated here are never committed, so that no text is in two places:
README.md (as index.md), the files of REPOSITORY, options.md from the declarations of the options,
and a page for each notebook. A notebook's page has the results of build/tutorials/, where
docs/tutorials/run.py puts the executed notebooks.
"""

import json
import re
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/RESULTS.md")
TITLES = [  # of the groups, in the order of the page
    "task and data", "data", "extraction", "views", "model", "training",
    "training through the encoder", "explanation", "output", "files", "computing", "messages",
]  # fmt: skip
OTHER_FILES = r"\]\((?:\.\./)*((?:LICENSE|CITATION\.cff|echofocus_core/|tests/)[^)]*)\)"


def on_files(files, config):
    """Add the generated pages."""
    pages = {"index.md": (ROOT / "README.md").read_text(), "options.md": options_page()}
    pages |= {name: (ROOT / name).read_text() for name in REPOSITORY}
    for path in sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")):
        pages[f"tutorials/{path.stem}.md"] = notebook_page(path)
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown, page, **_):
    """Links of repository files, as links between pages; those to other files become text."""
    markdown = re.sub(OTHER_FILES, r"](#)", markdown)
    markdown = re.sub(r"\[([^]]*)\]\(#\)", r"\1", markdown)
    markdown = re.sub(r"\]\(\.\./(README|[A-Z]+|benchmarks/RESULTS)\.md", r"](\1.md", markdown)
    if page.file.src_uri in ("index.md", *REPOSITORY):
        markdown = re.sub(r"\]\((\.\./)?docs/", r"](\1", markdown)
    markdown = markdown.replace("](tutorials)", "](tutorials/three-exams.md)")
    return markdown.replace("](README.md", "](index.md")


# ------------------------------------------------------------------------------------------ options


def options_page():
    """Every option, by group: names, values, default, meaning and commands."""
    sys.path.insert(0, str(ROOT))
    from echofocus_core.base.options import Settings, options_of
    from echofocus_core.encoder.settings import COMMAND, EncoderSettings

    names = {x for f in Settings.model_fields.values() for x in f.json_schema_extra["commands"]}
    commands = {x: options_of(x) for x in sorted(names - {COMMAND})}
    intro = (
        "# Options\n\nGenerated from the declarations in the code. An option may be written with "
        "`-` instead of `_`. A switch has an opposite, `--no_<name>`. A list takes several words. "
        "Options of groups marked *config* may also be keys of a task or a dataset in "
        "`config.json`. The command `extract` is `embed/extract.py`.\n"
    )
    mine = {"": options_of(COMMAND, EncoderSettings)}
    other = "\n# Options of embed/train.py\n\nThey keep their published names.\n"
    return intro + option_tables(commands) + other + option_tables(mine)


def option_tables(commands):
    """A table for each group of options. commands: name -> its options; '' for the only one."""
    options = {name: field for group in commands.values() for name, field in group.items()}
    groups = {}
    for name, field in options.items():
        groups.setdefault(field.json_schema_extra["group"].title, {})[name] = field
    several, text = "" not in commands, ""
    for title in sorted(groups, key=TITLES.index):
        group = next(iter(groups[title].values())).json_schema_extra["group"]
        text += f"\n## {title.capitalize()}{' (config)' * (several and group.in_config)}\n\n"
        text += "| option | values | default | meaning |" + " commands |" * several + "\n"
        text += "|---|---|---|---|" + "---|" * several + "\n"
        for name, field in groups[title].items():
            words = [name] if name == "source" else [f"--{name.rstrip('_')}"]
            words += [f"--{other}" for other in field.json_schema_extra["also"]]
            takers = [command for command, group in commands.items() if name in group]
            cells = ["<br>".join(f"`{word}`" for word in words), values_of(field)]
            cells += [default_of(field), safe(field.description)]
            cells += ["all but demo" if len(takers) > len(commands) - 2 else ", ".join(takers)]
            text += f"| {' | '.join(cells[: 4 + several])} |\n"
    return text


def values_of(field):
    """The values that an option takes, in words."""
    kind = field.annotation
    if kind is bool:
        return "switch"
    several = "list of " * (get_origin(kind) is list)
    kind = get_args(kind)[0] if several else kind
    if get_origin(kind) is Literal:
        return several + ", ".join(f"`{x}`" for x in get_args(kind) if x != "")
    names = {int: "whole number", float: "number", str: "text"}
    bounds = [getattr(x, "ge", None) for x in field.metadata]
    least = next((x for x in bounds if x is not None), None)
    metavar = field.json_schema_extra["argparse"].get("metavar", "")
    names[str] = f"`{metavar}`" if metavar else "text"
    name = several + names.get(kind, "number" if "float" in str(kind) else names[str])
    return f"{name}, at least {least:g}" if least is not None and least > -(2**62) else name


def default_of(field):
    empty = field.default in ("", [], False, None)
    return "" if empty else f"`{field.default}`"


def safe(text):
    """Text for a cell of a table in Markdown."""
    return re.sub(r"<", "&lt;", text).replace("|", "\\|").replace("*", "\\*")


# ---------------------------------------------------------------------------------------- tutorials


def notebook_page(path):
    """A notebook as Markdown: texts, code and, of an executed one, printed results."""
    executed = ROOT / "build" / "tutorials" / path.name
    cells = json.loads((executed if executed.is_file() else path).read_text())["cells"]
    text = ""
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            text += source + "\n\n"
            continue
        language = "bash" if source.startswith("%%bash") else "python"
        source = re.sub(r"^%%bash.*\n", "", source)
        text += f"```{language}\n{source}\n```\n\n"
        if results := "".join(map(printed, cell.get("outputs", []))):
            text += f"```text\n{results.strip()}\n```\n\n"
    return text + (
        f"*The notebook is `docs/tutorials/{path.name}`. To run it: `pip install . notebook`, then "
        f"`jupyter notebook docs/tutorials/{path.name}`.*\n"
    )


def printed(output):
    """What a result of a cell prints on a page; progress bars and warnings do not."""
    if output["output_type"] == "stream":
        return "".join(output["text"]) if output["name"] == "stdout" else ""
    return "".join(output.get("data", {}).get("text/plain", "")) + "\n"
