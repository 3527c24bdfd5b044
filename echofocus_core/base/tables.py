"""Read tables (labels, manifests, predictions) and the meaning of their cells.

What the file shows (delimiter, encoding, decimal comma, Yes/No) is recognised and reported; what is
ambiguous is refused with its line. No cell moves to another column, and no id becomes a number.
"""

import codecs
import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd

from echofocus_core.base.console import UserError, some

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
MISSING = {"", "NA", "N/A", "n/a", "<NA>", "NaN", "nan", "-NaN", "-nan", "null", "NULL", "None"}
MISSING |= {"#N/A", "#NA", "#N/A N/A", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"}  # as in pandas
CROSS = "x"  # means present in a column where only 0 and words for no mean absent
YES = {"yes", "y", "true", "t", "present", "positive", "pos", "ja", "j", "wahr", "positiv"}
YES |= {"oui", "vrai", "si", "sí", "verdadero", "vero", "sim", CROSS}
NO = {"no", "n", "false", "f", "absent", "negative", "neg", "nein", "falsch", "negativ", "non"}
NO |= {"faux", "falso", "não", "nao"}
INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200e\u200f\u2060\ufeff"))  # in column names

# ------------------------------------------------------------------------------------ from the file


def read_table(path, listener, what="table", words=None):
    """The cells of a table as text: DataFrame; the index is the line in the file.

    Blank cells and the usual words for 'missing' are None; blank rows are left out. words: column
    -> words for 'missing' that are values in this column. Raises UserError for rows of another
    length than the header, quotes that do not close, duplicate names, and other kinds of file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no {what} {path}; create the file, or correct its path")
    data = path.read_bytes()
    if data.startswith(b"PK\x03\x04"):
        lines, records, notes = excel_records(path)
    else:
        lines, records, notes = text_records(path, data)
    if not records:
        raise UserError(f"{path} is empty; a {what} begins with a line of column names")
    columns, records = rectangular(lines, records, path, notes)
    if notes:
        listener.note(f"{path}: read as {', '.join(notes)}")
    if not records:
        raise UserError(f"{path} has a line of column names and no rows; add them")
    words = words or {}
    table = {}
    for i, name in columns:
        missing, cells = MISSING - set(words.get(name, ())), [row[i].strip() for row in records]
        table[name] = [None if cell in missing else cell for cell in cells]
    return pd.DataFrame(table, index=pd.Index(lines[1:], name="line"), dtype=object)


def excel_records(path):
    """(lines, records, notes) of the first sheet with cells."""
    try:
        sheets = pd.read_excel(path, sheet_name=None, header=None, dtype=str, na_filter=False)
    except ImportError as error:
        raise UserError(
            f"{path} is an Excel file; save it as CSV, or install its reader: pip install openpyxl"
        ) from error
    except Exception as error:  # openpyxl raises many types on damaged files
        raise UserError(f"{path} is not a readable Excel file; save it as CSV") from error
    sheets = [cells for cells in sheets.values() if not cells.empty] or [pd.DataFrame()]
    rows = {i: list(row) for i, row in enumerate(sheets[0].to_numpy(), 1) if "".join(row).strip()}
    others = f", the first of {len(sheets)} with cells" if len(sheets) > 1 else ""
    return list(rows), list(rows.values()), [f"an Excel sheet{others}"]


def decode(data, path):
    """(text, its encoding for a note): UTF-8, UTF-16 with a mark, or cp1252."""
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    for encoding in ["utf-16"] if marked else ["utf-8-sig", "cp1252"]:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text, encoding
    raise UserError(f"{path} is not a text table; save it as CSV (UTF-8) or .xlsx")


def text_records(path, data):
    """(lines, records, notes) of a delimited text."""
    text, encoding = decode(data, path)
    notes = [] if encoding == "utf-8-sig" else [encoding]
    lines = io.StringIO(text, newline="").readlines()  # ends at \n, \r\n and \r alone
    delimiter = find_delimiter(lines)
    if delimiter != ",":
        notes.append(f"cells between {DELIMITERS[delimiter]}")
    records = {n: r for n, r in parse(lines, delimiter, path) if any(map(str.strip, r))}
    return list(records), list(records.values()), notes


def parse(lines, delimiter, path):
    """Yield (first line, record). Raises UserError for quotes that do not close."""
    reader = csv.reader(
        iter(lines), delimiter=delimiter, strict=True, skipinitialspace=delimiter != "\t"
    )
    number = 1
    try:
        for record in reader:
            parts = [part for cell in record for part in cell.splitlines()[1:]]
            if any(part.count(delimiter) >= max(1, len(record) - 1) for part in parts):
                raise csv.Error("a cell holds whole rows: its quote was not meant to open one")
            yield number, record
            number = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f'{path}, line {number}: a quote (") does not close; correct or remove it ({error})'
        ) from error


def find_delimiter(lines, n=200):
    """The delimiter that splits most of the first rows like the header, into the most cells."""
    lines = [line for line in lines if line.strip()][:n]
    best = (0, 0), ","
    for delimiter in DELIMITERS:
        counts = []
        try:
            for record in csv.reader(iter(lines), delimiter=delimiter, skipinitialspace=True):
                counts.append(len(record))
        except csv.Error:  # reported by `parse`, with its line
            pass
        if counts and counts[0] > 1:
            share = counts.count(counts[0]) / len(counts)
            best = max(best, ((round(share, 1), counts[0]), delimiter))
    return best[1]


def rectangular(lines, records, path, notes):
    """([(position, name)] of the columns, the rows). Adds to `notes` what is left out.

    Columns without a name and empty cells at the end of rows are left out. Raises UserError for a
    row of another width, since its cells would be in the wrong columns, and for duplicate names.
    """
    header, *rows = records
    names = [" ".join(name.translate(INVISIBLE).split()) for name in header]
    width = max((i + 1 for i, name in enumerate(names) if name), default=0)
    widths = {len(row) for row in rows}
    extra = any("".join(row[width:]).strip() for row in rows)
    if widths - {len(header)} and (extra or min(widths) < width or len(widths) > 1):
        odd = [(n, len(r)) for n, r in zip(lines[1:], rows, strict=True) if len(r) != len(header)]
        raise UserError(
            f"{path}, line {odd[0][0]} has {odd[0][1]} fields and the header {len(header)} "
            f"({len(odd)} such rows: line {some(n for n, _ in odd)}); a cell with a "
            "delimiter in it needs quotes"
        )
    unnamed = [i for i in range(width) if not names[i]]
    if unnamed or extra:
        notes.append(f"columns without a name ({some(i + 1 for i in unnamed) or 'last'}) left out")
    used = [(i, name) for i, name in enumerate(names) if name]
    if twice := [name for _, name in used if names.count(name) > 1]:
        raise UserError(f"{path} has two columns '{twice[0]}'; rename or delete one")
    return used, rows


# --------------------------------------------------------------------------------- ids and numbers


def clean_ids(column, path, listener):
    """Ids as text (Series with the lines as index): leading zeros stay, 123.0 becomes 123.

    An id that a spreadsheet has rounded (1.2E+11) is an error: several ids may have become one.
    """
    column = column.str.strip().str.replace(r'^="(.*)"$', r"\1", regex=True)
    column = column.str.replace(r"^(\d+)\.0+$", r"\1", regex=True)
    cut = column.str.fullmatch(r"\d([.,]\d+)?[eE]\+\d+", na=False).astype(bool)
    if cut.any():
        listener.error(
            f"{path}, line {some(column.index[cut])}: a spreadsheet has rounded the {column.name} "
            f"to {column[cut].iloc[0]}",
            "format the column as text and enter the ids again",
        )
    return column


DECIMAL_COMMA = r"[-+]?(\d+|\d{1,3}(\.\d{3})+),\d+"
THOUSANDS = r"[-+]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?"  # 1,234 may also be 1.234
THOUSANDS_BY_POINT = r"[-+]?[1-9]\d{0,2}\.\d{3}"


def to_numbers(text, path, listener):
    """Cells as text (DataFrame) -> float64 of the same shape, NaN for what is not a finite number.

    Decimal commas are recognised and reported; a comma or point that may separate thousands is an
    error. Yes/No, true/false, present/absent, positive/negative, in some languages, become 1/0 in
    columns that hold no numbers but 0 and 1. A % at the end of all numbers of a column is removed.
    """
    for name in text:
        numbers = text.loc[text[name].str.contains(r"\d", na=False), name]
        if len(numbers) and numbers.str.endswith("%").all():
            listener.note(f"{path}, {name}: the % of its numbers is removed")
            text = text.assign(**{name: text[name].str.rstrip("% ")})
    values = text.apply(lambda column: pd.to_numeric(column, errors="coerce").astype(float))
    values = values.where(np.isfinite(values))
    commas = {}
    for name in text:
        rest = text.loc[text[name].notna() & values[name].isna(), name]
        commas[name] = rest[rest.str.fullmatch(f"{DECIMAL_COMMA}|{THOUSANDS}").astype(bool)]
    has_decimal_commas = not all(x.str.fullmatch(THOUSANDS).all() for x in commas.values())
    converted = []
    for name, cells in commas.items():
        if not len(cells) and not has_decimal_commas:
            continue
        dotted = text.loc[text[name].str.contains(".", regex=False, na=False), name]
        dotted = dotted[values[name].loc[dotted.index].notna()]
        if len(cells):
            clear = has_decimal_commas and cells.str.fullmatch(DECIMAL_COMMA).all()
            clear = clear and not len(dotted)
        else:
            clear = not len(dotted) or not dotted.str.fullmatch(THOUSANDS_BY_POINT).all()
        if not clear:
            cells = pd.concat([cells[:1], dotted[:1]])
            listener.error(
                f"{path}, {name}: {' and '.join(cells)} (line {some(cells.index)}) may be decimals "
                "or thousands",
                "write numbers with a decimal point and without separators of thousands",
            )
            values[name] = np.nan
        elif len(cells):
            plain = cells.str.replace(".", "", regex=False).str.replace(",", ".", regex=False)
            values.loc[cells.index, name] = plain.astype(float)
            converted.append(name)
    if converted:
        listener.note(f"{path}: decimal commas in {some(converted)}")
    by_words = {}
    for name in text:
        if words := read_words(text[name], values, name):
            by_words.setdefault(words, []).append(name)
    for words, names in by_words.items():
        listener.note(f"{path}: words read as 1/0 in {some(names)}: {words}")
    return values


def read_words(text, values, name):
    """Write 1 and 0 for Yes, No and the like into `values`; returns the words and meanings."""
    if not values[name].dropna().isin([0, 1]).all():
        return ""
    rest = text[text.notna() & values[name].isna()].str.lower()
    words = rest[rest.isin(YES | NO)]
    if (values[name] == 1).any() or set(rest) - NO - {CROSS}:  # a cross may mean unknown
        words = words[words != CROSS]
    values.loc[words.index, name] = words.isin(YES).astype(float)
    both = (sorted(set(words) & kind) for kind in (YES, NO))
    meanings = [f"{', '.join(x)} = {y}" for x, y in zip(both, (1, 0), strict=True) if x]
    if meanings == [f"{CROSS} = 1"] and not (values[name] == 0).any():
        meanings.append("empty cells stay missing, write 0 where the finding is absent")
    return "; ".join(meanings)


def ages_to_years(text):
    """Ages as in DICOM (018Y, 011M, 003W, 020D) in years, Series of float; NaN for other cells."""
    parts = text.str.extract(r"^(\d{1,3})([YMWD])$")
    return parts[0].astype(float) / parts[1].map({"Y": 1, "M": 12, "W": 365.25 / 7, "D": 365.25})


# ------------------------------------------------------------------------------------------- dates

YEAR_FIRST = r"^(?P<y>\d{4})([-/.]?)(?P<m>\d{1,2})\2(?P<d>\d{1,2})(?P<time>[T ].*)?$"
YEAR_LAST = r"^(?P<d>\d{1,2})([-/.])(?P<m>\d{1,2})\2(?P<y>\d{4})(?P<time>[T ].*)?$"


def read_dates(text):
    """(dates (S,), their order of day, month and year) of cells of text.

    The whole column decides whether 01/02/2020 is in January; (None, 'ambiguous') if it does not.
    (None, '') if some cells are not dates.
    """
    cells = text.dropna()
    for pattern, order in ((YEAR_FIRST, "year first"), (YEAR_LAST, "day first")):
        parts = cells.str.extract(pattern)
        if not len(cells) or parts["y"].isna().any():
            continue
        if pattern == YEAR_LAST and not cells.str.contains(".", regex=False).all():
            above = [(parts[x].astype(int) > 12).any() for x in ("d", "m")]
            if above[0] == above[1]:
                return None, "ambiguous"
            if above[1]:
                parts, order = parts.rename(columns={"d": "m", "m": "d"}), "month first"
        days = parts["y"] + "-" + parts["m"].str.zfill(2) + "-" + parts["d"].str.zfill(2)
        plain = days + parts["time"].fillna("")
        dates = pd.to_datetime(plain, format="ISO8601", errors="coerce", utc=True)
        if dates.notna().all():
            return dates.reindex(text.index), order
    return None, ""
