"""The HTML pages: one style sheet, one way to render templates."""

from pathlib import Path

from echofocus_core.base.files import atomic_path

TEMPLATES = Path(__file__).with_name("templates")


def page_templates():
    """The Jinja environment of all pages: it escapes all texts, and a missing value is an error."""
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    templates = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    compact = {"ensure_ascii": False, "separators": (",", ":")}
    templates.policies["json.dumps_kwargs"] = compact
    return templates


def write_text(path, text):
    """Write a text file in UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
