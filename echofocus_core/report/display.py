"""What reports show: names as journals print them, numbers as text, and tables for page and paper.

table = Table("Results", ["Label", "n", "AUROC"], [["VSD", "120", cell_of(estimate)]])
export_tables([table], Path("tables_test_site"))  # .html to paste into Word, .tex for LaTeX
"""

import base64
import re
from dataclasses import dataclass, field
from html import escape
from string import ascii_lowercase

import numpy as np

from echofocus_core.base.files import atomic_path

NAMES = {
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "brier": "Brier score",
    "calibration_slope": "Calibration slope",
    "calibration_intercept": "Calibration intercept",
    "ece": "ECE",
    "ppv": "PPV",
    "npv": "NPV",
    "lr_positive": "LR+",
    "lr_negative": "LR\u2212",
    "f1": "F1 score",
    "true_positive": "True positives",
    "false_positive": "False positives",
    "true_negative": "True negatives",
    "false_negative": "False negatives",
    "ppv_at_prevalence": "PPV at the prevalence",
    "npv_at_prevalence": "NPV at the prevalence",
    "rmse": "RMSE",
    "loa_low": "Lower limit of agreement",
    "loa_high": "Upper limit of agreement",
    "r2": "R\u00b2",
    "pearson": "Pearson\u2019s r",
    "spearman": "Spearman\u2019s \u03c1",
    "c_index": "C index",
    "kappa": "Weighted kappa",
}
BEGINNINGS = {  # of metrics of a class, a time or a quarter, with the text before its name
    "auroc_at_": "AUROC at year ",
    "auroc_": "AUROC, ",
    "median_absolute_error_q": "Median absolute error, quarter ",
}
MAX_NOTES = 8  # footnotes of a table; if there are more, the table of all metrics has them


def metric_name(metric, unit=""):
    """'lr_positive' -> 'LR+'; 'rmse' with its unit -> 'RMSE (cm)'."""
    text = NAMES.get(metric)
    if text is None:
        start = next((x for x in BEGINNINGS if metric.startswith(x)), "")
        text = BEGINNINGS.get(start, "") + metric.removeprefix(start)
        text = text if start else capital(metric.replace("_", " "))
    return text + (f" ({unit})" if unit else "")


def capital(text):
    """The text with a capital as its first letter."""
    return text[:1].upper() + text[1:]


def number(value, like=0.0):
    """A number as text with three digits, and as many decimals as `like` would have."""
    if value is None or not np.isfinite(value):
        return "n/a" if value is None or np.isnan(value) else "infinite"
    size = max(abs(value), abs(like) if np.isfinite(like) else 0)
    digits = 3 if size <= 1 else 2 if size < 10 else 1 if size < 100 else 0
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "\u2212")


def p_value(p):
    """A p value as text, '' for a missing one."""
    return "" if p is None or np.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def interval_text(low, high):
    """'0.853 to 0.951', or '' if it is not defined; a missing upper limit is infinite."""
    if low is None or not np.isfinite(low):
        return ""
    high = np.inf if high is None or np.isnan(high) else high
    return f"{number(low, high)} to {number(high, high)}"


def with_interval(estimate):
    """'0.912 (0.853 to 0.951)'; only the value if the interval is not defined."""
    return str(cell_of(estimate))


@dataclass(frozen=True)
class Cell:
    """A value of a table with its interval, as text, and a footnote."""

    text: str
    interval: str = ""
    note: str = ""

    def __str__(self):
        return self.text + (f" ({self.interval})" if self.interval else "")


def cell_of(estimate, note=True):
    """The Cell of an Estimate, with its note as a footnote."""
    text = number(estimate.value, estimate.ci_high)
    note = estimate.note if note else ""
    return Cell(text, interval_text(estimate.ci_low, estimate.ci_high), note)


@dataclass
class Table:
    """A table of a report: cells are text or a Cell, the first `n_text` columns are text."""

    title: str
    head: list
    rows: list
    note: str = ""  # below the table
    n_text: int = 1
    notes: list = field(init=False)  # footnotes a, b, ...

    def __post_init__(self):
        width = len(self.head)
        if any(len(row) != width for row in self.rows):
            raise ValueError(f"table {self.title}: a row has not {width} cells")
        self.rows = [[x if isinstance(x, Cell) else Cell(str(x)) for x in r] for r in self.rows]
        self.notes = list(dict.fromkeys(x.note for row in self.rows for x in row if x.note))

    def mark(self, cell):
        """The letter of a cell's footnote; an asterisk if there are too many footnotes."""
        if not cell.note:
            return ""
        return "*" if self.too_many else ascii_lowercase[self.notes.index(cell.note)]

    @property
    def too_many(self):
        return len(self.notes) > MAX_NOTES

    @property
    def footnotes(self):
        """[(mark, text)] below the table."""
        if self.too_many:
            return [("*", "see the notes in the table of all metrics")]
        return list(zip(ascii_lowercase, self.notes, strict=False))

    def without_empty_columns(self):
        """The table without columns in which no row has text."""
        kept = [i for i in range(len(self.head)) if any(r[i].text for r in self.rows)]
        n_text = sum(i < self.n_text for i in kept)
        head, rows = [self.head[i] for i in kept], [[r[i] for i in kept] for r in self.rows]
        return Table(self.title, head, rows, self.note, n_text)


def as_base64(path):
    """The PNG of a figure, for a page that needs no other file. path: of `save_figure`."""
    return base64.b64encode(path.with_name(path.name + ".png").read_bytes()).decode()


# -------------------------------------------------------------------------------- tables for papers


def export_tables(tables, path):
    """Write Tables as <path>.html, which word processors paste as tables, and <path>.tex."""
    forms = {".html": html_document, ".tex": latex_document}
    for suffix, document in forms.items():
        with atomic_path(path.with_name(path.name + suffix)) as temporary:
            temporary.write_text(document(tables), encoding="utf-8")
    return [path.name + suffix for suffix in forms]


def html_document(tables):
    """Plain tables with three lines, styled inline, because pasting drops style sheets."""
    parts = []
    for k, table in enumerate(tables, 1):
        lines = []
        for i, row in enumerate([list(map(Cell, table.head)), *table.rows]):
            tag, cells = "th" if i == 0 else "td", []
            for j, cell in enumerate(row):
                side = "left" if j < table.n_text else "right"
                style = f"padding:2pt 6pt;text-align:{side};vertical-align:top;"
                style += "border-top:1.5pt solid black;" * (i == 0)
                style += "border-bottom:0.75pt solid black;" * (i == 0)
                style += "border-bottom:1.5pt solid black;" * (i == len(table.rows))
                mark = f"<sup>{table.mark(cell)}</sup>" if cell.note else ""
                cells.append(f'<{tag} style="{style}">{escape(str(cell))}{mark}</{tag}>')
            lines.append(f"<tr>{''.join(cells)}</tr>")
        notes = [f"<sup>{mark}</sup> {escape(text)}" for mark, text in table.footnotes]
        notes += [escape(table.note)] if table.note else []
        parts.append(
            f"<p><b>Table {k}.</b> {escape(table.title)}</p>\n"
            '<table style="border-collapse:collapse;font:9pt Arial,sans-serif">\n'
            + "\n".join(lines)
            + "\n</table>\n"
            + "".join(f'<p style="font:8pt Arial,sans-serif">{x}</p>\n' for x in notes)
        )
    return '<!doctype html>\n<meta charset="utf-8">\n<title>Tables</title>\n' + "\n".join(parts)


LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {x: f"\\{x}" for x in "&%$#_{}"}
LATEX |= {"\u2212": "$-$", "\u00b2": "$^2$", "\u03c1": r"$\rho$", "<": "$<$", ">": "$>$"}
LATEX |= {"\u2265": r"$\geq$", "\u00a0": "~", "\u2019": "'"}


def latex(text):
    """Text for LaTeX."""
    return re.sub(r"[\s\S]", lambda x: LATEX.get(x[0], x[0]), text)


LETTERS = 100  # of a line of footnotesize


def latex_columns(table):
    """The columns of a table: as wide as their texts, or parts of a line that is too short."""
    columns = [list(map(str, column)) for column in zip(table.head, *table.rows, strict=True)]
    longest = [max(map(len, column)) for column in columns]
    sides = ["left" if j < table.n_text else "right" for j in range(len(columns))]
    if sum(longest) + len(columns) < LETTERS:
        return "".join(side[0] for side in sides)
    words = [
        max(len(word) for text in column for word in text.split() or [""]) for column in columns
    ]
    parts = [max(word, min(n, 12)) + 1 for word, n in zip(words, longest, strict=True)]
    share = (1 - 0.014 * len(columns)) / sum(parts)
    # "left" text is ragged at its right side
    return "".join(
        f">{{\\ragged{'right' if side == 'left' else 'left'}\\arraybackslash}}"
        f"p{{{part * share:.3f}\\linewidth}}"
        for part, side in zip(parts, sides, strict=True)
    )


def latex_document(tables):
    """Tables with the rules of booktabs, for \\input.

    Rows begin with {}, because \\\\ and \\toprule would read [ or * there as their option.
    """
    parts = ["% needs \\usepackage{array,booktabs,longtable}"]
    for table in tables:
        rows = [
            " & ".join(
                latex(str(x)) + (f"\\textsuperscript{{{table.mark(x)}}}" if x.note else "")
                for x in row
            )
            for row in table.rows
        ]
        notes = [f"\\textsuperscript{{{mark}}} {latex(text)}" for mark, text in table.footnotes]
        notes += [latex(table.note)] if table.note else []
        parts.append(
            f"{{\\footnotesize\\setlength{{\\tabcolsep}}{{3pt}}\n\\begin{{longtable}}"
            f"{{{latex_columns(table)}}}\n"
            f"\\caption{{{latex(table.title)}}}\\\\\n\\toprule\n"
            f"{{}}{' & '.join(map(latex, table.head))} \\\\\n\\midrule\n\\endhead\n"
            f"\\bottomrule\n\\endlastfoot\n"
            + "".join(f"{{}}{row} \\\\\n" for row in rows)
            + "\\end{longtable}\n"
            + "".join(f"\\noindent {x}\\par\n" for x in notes)
            + "}\n"
        )
    return "\n".join(parts)
