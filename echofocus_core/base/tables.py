"""One reader of every table: label tables, manifests, lists; and what their cells mean.

A spreadsheet writes a table in many ways. What can be told from the file (delimiter, encoding,
decimal comma, Yes/No) is read as meant and said; what cannot is refused with its line. No cell is
ever shifted to another column, and no id is ever a number.
"""

import codecs
import csv
import io
import re
import zipfile
from itertools import pairwise, zip_longest
from pathlib import Path

import numpy as np
import pandas as pd

from echofocus_core.base.console import UserError, printable, some

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
MOST_BYTES = 1 << 30  # a larger file is no table of labels or videos
MOST_ROWS, MOST_COLUMNS, MOST_CELLS = 1 << 20, 5_000, 20_000_000  # of a sheet, up to its last cells
MOST_SHRUNK = 100  # a sheet's XML shrinks to a tenth; what unpacks to more than this is a bomb
MISSING = {"", "NA", "N/A", "n/a", "<NA>", "NaN", "nan", "-NaN", "-nan", "null", "NULL", "None"}
MISSING |= {"#N/A", "#NA", "#N/A N/A", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"}  # as pandas has
YES = {"yes", "y", "true", "t", "present", "positive", "pos"}
NO = {"no", "n", "false", "f", "absent", "negative", "neg"}
UNSEEN = dict.fromkeys(map(ord, "\u00ad\u200b\u200e\u200f\u2060\ufeff"))  # in a column's name
COMMENT = re.compile(r"\s*#(?!N/?A|[A-Z0-9/]+[!?])")  # not the #N/A or #DIV/0! of a spreadsheet

# ------------------------------------------------------------------------------------ from the file


def read_table(path, listener, what="table", words=None):
    """A table's cells as text: DataFrame, one column a name; the index is the line in the file.

    Blank cells and the usual words for 'missing' are None; blank rows and rows that begin with #
    are left out. What was recognised is told to `listener` (see common/console.py). Raises
    UserError for what cannot be read: rows of another length than the header, quotes that do not
    close, names that stand twice, other kinds of file.

    words: column -> those words for 'missing' that are values there.
    """
    path = Path(path)
    data = read_bytes(path, what)
    if data.startswith(b"PK\x03\x04"):
        lines, records, said = xlsx_records(path, data)
    elif data.startswith(b"\xd0\xcf\x11\xe0"):
        raise UserError(f"{path} is an old Excel file; save it as CSV or .xlsx")
    else:
        text, said = decode(data, path)
        lines, records = text_records(text, path, said)
    if not records:
        raise UserError(f"{path} is empty; a {what} begins with a line of column names")
    names, records = squared(lines, records, path, said)
    if said:
        listener.note(f"{path}: read as {', '.join(said)}")
    if not records:
        raise UserError(f"{path} has a line of column names and no rows; add them")
    columns = (
        [cell_of(row[i], (words or {}).get(name, ())) for row in records] for i, name in names
    )
    table = dict(zip((name for _, name in names), columns, strict=True))
    return pd.DataFrame(table, index=pd.Index(lines[1:], name="line"), dtype=object)


def read_bytes(path, what):
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file; a {what} is a CSV or .xlsx file")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} has more than {MOST_BYTES >> 30} GiB; is it a {what}?")
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"no {what} {path}: {error.strerror or error}; make it, or mend its path"
        ) from error


def cell_of(text, words=()):
    text = text.strip()
    return None if text in MISSING and text not in words else text


def decode(data, path):
    """Bytes -> (text, what was recognised): UTF-8, UTF-16 (both with or without mark), cp1252."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return decoded(data, "utf-32", path), ["UTF-32"]
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return decoded(data, "utf-16", path), ["UTF-16"]
    head = np.frombuffer(data[:4096], np.uint8)
    for kind, first in (("utf-16-le", 1), ("utf-16-be", 0)):  # every other byte of ASCII is 0
        if len(head) > 3 and (head[first::2] == 0).mean() > 0.7 and head[1 - first :: 2].all():
            return decoded(data, kind, path), ["UTF-16"]
    if b"\0" in data:
        raise UserError(
            f"{path}, line {1 + data[: data.index(0)].count(10)}, holds a NUL byte: it is damaged "
            "or no text; save it anew as CSV (UTF-8)"
        )
    try:
        return data.decode("utf-8-sig"), []
    except UnicodeDecodeError as error:
        good = len(re.findall(rb"[\xc2-\xf4][\x80-\xbf]+", data))
        if good > len(re.findall(rb"[\x80-\xff]", data)) - 3 * good:  # UTF-8 with a damaged place
            line = 1 + data[: error.start].count(b"\n")
            raise UserError(
                f"{path}, line {line}: bytes that are not UTF-8, as the rest is; save it anew"
            ) from error
    table = {0x81: 0x81, 0x8D: 0x8D, 0x8F: 0x8F, 0x90: 0x90, 0x9D: 0x9D}  # undefined in cp1252
    text = "".join(chr(table[b]) if b in table else bytes([b]).decode("cp1252") for b in range(256))
    return data.decode("latin-1").translate(dict(enumerate(text))), ["Latin-1 (cp1252)"]


def decoded(data, encoding, path):
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged {encoding.upper()} text; save it anew") from error


def text_records(text, path, said):
    """Text -> (line of each record, the records); adds to `said` what was recognised."""
    lines = io.StringIO(text, newline="").readlines()  # ends at \n, \r\n and \r alone
    begin, delimiter = 0, ""
    if lines and (match := re.fullmatch(r'"?sep=([,;|\t])"?[,;|\t]*[\r\n]*', lines[0])):
        begin, delimiter = 1, match[1]
    if comments := [i + 1 for i in range(begin, len(lines)) if COMMENT.match(lines[i])]:
        said.append(f"{len(comments)} lines of comment (line {some(comments)}), left out")
    delimiter = delimiter or find_delimiter(lines[begin:])
    if delimiter != ",":
        said.append(f"cells between {DELIMITERS[delimiter]}")
    numbers, records = [], []
    for number, record in parsed(lines, begin, delimiter, path):
        if COMMENT.match(lines[number - 1]) or not any(map(str.strip, record)):
            continue
        numbers.append(number)
        records.append(record)
    return numbers, records


def parsed(lines, begin, delimiter, path):
    """Yield (line where it begins, record). Raises UserError for quotes that do not close."""
    reader = csv.reader(
        iter(lines[begin:]), delimiter=delimiter, strict=True, skipinitialspace=delimiter != "\t"
    )
    number = begin + 1
    try:
        for record in reader:
            end = begin + reader.line_num
            if end > number and any(
                part.count(delimiter) and part.count(delimiter) >= len(record) - 1
                for cell in record
                for part in cell.splitlines()
            ):
                break  # a cell that holds whole rows: its quote was never meant to be one
            yield number, record
            number = end + 1
        else:
            return
    except csv.Error as error:
        if "field larger" in str(error):
            raise UserError(f"{path}, line {number}: a cell of over 100 kB; mend it") from error
    raise UserError(f'{path}, line {number}: a quote (") does not close; mend it or leave it out')


def find_delimiter(lines, n=200):
    """The delimiter that cuts the first rows into as many cells as the header; the most of them."""
    lines = [x for x in lines if x.strip() and not COMMENT.match(x)][:n]
    best, found = (0, 0), ","
    for delimiter in DELIMITERS:
        counts = []
        try:
            for record in csv.reader(iter(lines), delimiter=delimiter, skipinitialspace=True):
                counts.append(len(record))
        except csv.Error:
            pass  # said later, with its line
        if counts and counts[0] > 1:
            alike = sum(count == counts[0] for count in counts) / len(counts)
            best, found = max((best, found), ((round(alike, 1), counts[0]), delimiter))
    return found


def squared(lines, records, path, said):
    """([(place, name)] of the columns, the rows), all of one width.

    A column without name is left out; empty cells at the end of each row are too. A row of
    another width raises UserError: its cells would stand in others' columns.
    """
    header, *rows = records
    names = [" ".join(name.translate(UNSEEN).split()) for name in header]
    width = max((i + 1 for i, name in enumerate(names) if name), default=0)
    widths = {len(row) for row in rows}
    if len(widths | {len(header)}) > 1:
        if (
            len(widths) > 1
            or min(widths) < width
            or any(any(map(str.strip, row[len(header) :])) for row in rows)
        ):
            common = len(header)
            odd = [(n, len(r)) for n, r in zip(lines[1:], rows, strict=True) if len(r) != common]
            raise UserError(
                f"{path}, line {odd[0][0]} has {odd[0][1]} fields and the header {common} "
                f"({len(odd)} such rows: line {some(n for n, _ in odd)}); a cell with a "
                "delimiter in it needs quotes, an empty one its place"
            )
        said.append("an empty cell at the end of each row, left out")
    unnamed = [i for i in range(width) if not names[i]]
    unnamed += [
        i for i in range(width, len(header)) if any("".join(row[i : i + 1]).strip() for row in rows)
    ]
    if unnamed:
        said.append(f"column {some(i + 1 for i in unnamed)} without a name, left out")
    used = [(i, name) for i, name in enumerate(names) if name]
    for (_, a), (_, b) in pairwise(sorted(used, key=lambda x: x[1])):
        if a == b:
            raise UserError(f"{path} has two columns '{printable(a)}'; rename or delete one")
    return used, rows


# ------------------------------------------------------------------------------------------- .xlsx


def xlsx_records(path, data):
    """(lines, records) of the first sheet that holds something, as text; what it is, for a note."""
    try:
        import openpyxl
    except ImportError as error:
        raise UserError(
            f"{path} is an Excel file: install openpyxl (the extra 'xlsx'), or save it as CSV"
        ) from error
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        parts = [x for x in archive.infolist() if x.filename.startswith("xl/")]
        size = sum(x.file_size for x in archive.infolist())
        if not parts or size > min(2 * MOST_BYTES, MOST_SHRUNK * len(data) + MOST_BYTES // 1024):
            raise UserError(f"{path} is a zip file and no Excel sheet; save it as CSV")
        sheets = [x for x in parts if x.filename.startswith("xl/worksheets/sheet")]
        computed = any(re.search(rb"<f[ >/]", archive.read(x)) for x in sheets)
        values, said = first_sheet(openpyxl, path, data, data_only=True)
        formulas = first_sheet(openpyxl, path, data, data_only=False)[0] if computed else {}
    except UserError:
        raise
    except Exception as error:  # openpyxl raises many kinds on a damaged file
        raise UserError(f"{path} is a damaged Excel file; save it anew, or as CSV") from error
    for line, row in formulas.items():
        for formula, value in zip_longest(row, values.get(line, []), fillvalue=""):
            if formula.startswith("=") and not value:
                raise UserError(
                    f"{path}, line {line}: {printable(formula)[:30]} was never computed; open and "
                    "save it in the spreadsheet program, or save it as CSV"
                )
    width = max((i + 1 for row in values.values() for i, x in enumerate(row) if x), default=0)
    return list(values), [row[:width] for row in values.values()], said


def first_sheet(openpyxl, path, data, data_only):
    """(line -> cells as text, of the first sheet with cells; what is to be said of the file)."""
    found, others, percentages = {}, 0, False
    book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=data_only)
    for sheet in book.worksheets:
        sheet.reset_dimensions()  # as declared by others: count instead
        rows = sheet_rows(sheet, path)
        if found:
            try:
                others += next(rows, None) is not None
            except UserError:  # cells far away: it is not read
                others += 1
            continue
        for line, row in rows:
            percentages |= any(map(is_percentage, row))
            found[line] = [excel_text(cell) for cell in row]
        found = {line: row for line, row in found.items() if any(row)}
        width = max(map(len, found.values()), default=0)
        found = {line: row + [""] * (width - len(row)) for line, row in found.items()}
    said = ["an Excel sheet", f"the first of {1 + others} with cells"][: 2 if others else 1]
    return found, said + ["percentages as they are shown (55 for 55%)"] * percentages


def sheet_rows(sheet, path):
    """(line, its cells up to the last with a value) of the rows with values. UserError, also for
    empty ones without end: one cell far away makes all before it."""
    n = 0
    for line, row in enumerate(sheet.iter_rows(), 1):
        width = max((i for i, cell in enumerate(row, 1) if cell.value is not None), default=0)
        n += width
        if line > MOST_ROWS or width > MOST_COLUMNS or n > MOST_CELLS:
            raise UserError(
                f"{path}, sheet {printable(sheet.title)[:50]}, line {line}: cells so far from the "
                "first are no table; delete them, or save the table as CSV"
            )
        if width:
            yield line, row[:width]


def is_percentage(cell):
    form = str(cell.number_format) if type(cell.value) in (int, float) else ""
    return bool(re.fullmatch(r"[0.]+ ?%", form))


def excel_text(cell):
    """A cell as a person sees it: 5.0 is 5, 123 by the format 00000 is 00123, 0.55 by 0% is 55."""
    value = cell.value
    if value is None:
        return ""
    if is_percentage(cell):
        value = round(100 * value, 9)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    if isinstance(value, int) and re.fullmatch("0{2,}", str(cell.number_format)):
        return str(value).zfill(len(cell.number_format))
    return str(value).strip()


# ------------------------------------------------------------------------------ ids, numbers, words


def clean_ids(column, path, listener):
    """Ids as text (Series with the lines as index): zeros in front stay, 123.0 is 123.

    An id that a spreadsheet has cut (1.2E+11) is an error: several ids may have become one.
    """
    column = column.str.strip().str.replace(r'^="(.*)"$', r"\1", regex=True)
    column = column.str.replace(r"^(\d+)\.0+$", r"\1", regex=True)
    cut = column.str.fullmatch(r"\d([.,]\d+)?[eE]\+\d+", na=False).astype(bool)
    if cut.any():
        listener.error(
            f"{path}, line {some(column.index[cut])}: a spreadsheet has cut the {column.name} to "
            f"{column[cut].iloc[0]}",
            "format the column as text and fill it in again",
        )
    return column


DECIMAL_COMMA = r"[-+]?(\d+|\d{1,3}(\.\d{3})+),\d+"
THOUSANDS = r"[-+]?\d{1,3}(,\d{3}){2,}|[-+]?\d{1,3}(,\d{3})+\.\d+"
EITHER = r"[-+]?[1-9]\d{0,2},\d{3}"  # 1,234: one and a bit, or over a thousand


def to_numbers(text, path, listener):
    """Cells as text (DataFrame) -> float64 of the same shape, NaN for what is no finite number.

    Decimal commas and separators of thousands are recognised and said; where both would fit it is
    an error. Yes/No, true/false, present/absent, positive/negative become 1/0, said once, in
    columns that hold nothing else than these and 0 or 1.
    """
    values = text.apply(lambda column: pd.to_numeric(column, errors="coerce").astype(float))
    values = values.where(np.isfinite(values))
    commas = {name: comma_cells(text[name], values[name]) for name in text}
    commas = {name: cells for name, cells in commas.items() if len(cells)}
    styles = {name: comma_styles(cells) for name, cells in commas.items()}
    common = set().union(*styles.values()) - {"either"}
    read = {}
    for name, cells in commas.items():
        own = styles[name] - {"either"} or common
        dotted = text[name][text[name].str.contains(".", regex=False, na=False)]
        dotted = dotted[dotted.index.isin(values.index[values[name].notna()])]
        if len(own) != 1 or ("decimal commas" in own and len(dotted)):
            both = [cells.iloc[0], *dotted.head(1)]
            lines = [cells.index[0], *dotted.head(1).index]
            refuse_commas(path, name, both, lines, listener)
            continue
        (style,) = own
        plain = cells.str.replace("." if style == "decimal commas" else ",", "", regex=False)
        values.loc[cells.index, name] = plain.str.replace(",", ".", regex=False).astype(float)
        read.setdefault(style, []).append(name)
    if "decimal commas" in common:
        refuse_dotted_thousands(text, values, path, listener, commas)
    for style, names in read.items():
        listener.note(f"{path}: {style} in {some(names)}")
    words = [name for name in text if read_words(text[name], values, name)]
    if words:
        listener.note(f"{path}: words such as Yes/No read as 1/0 in {some(words)}")
    return values


def comma_cells(text, values):
    """The cells that are numbers but for their commas."""
    rest = text[text.notna() & values.isna()]
    return rest[rest.str.fullmatch(f"{DECIMAL_COMMA}|{THOUSANDS}").astype(bool)]


def comma_styles(cells):
    either = cells.str.fullmatch(EITHER).astype(bool)
    thousands = cells.str.fullmatch(THOUSANDS).astype(bool)
    kinds = (either, "either"), (thousands, "separators of thousands")
    kinds += ((~either & ~thousands, "decimal commas"),)
    return {kind for where, kind in kinds if where.any()}


def refuse_commas(path, name, cells, lines, listener):
    listener.error(
        f"{path}, {name}: {' and '.join(cells)} (line {some(lines)}) may be decimals or thousands",
        "write numbers with a decimal point and no separator of thousands",
    )


def refuse_dotted_thousands(text, values, path, listener, commas):
    """In a table of decimal commas, a column of 1.234 alone may mean thousands."""
    for name in text.columns.difference(list(commas)):
        dotted = text[name][text[name].str.contains(".", regex=False, na=False)]
        if len(dotted) and dotted.str.fullmatch(r"[-+]?[1-9]\d{0,2}\.\d{3}").all():
            refuse_commas(path, name, [dotted.iloc[0]], [dotted.index[0]], listener)
            values[name] = np.nan


def read_words(text, values, name):
    """Write 1 and 0 for words into `values`, if the column is one of words; whether it is."""
    if not values[name].dropna().isin([0, 1]).all():
        return False
    rest = text[text.notna() & values[name].isna()].str.lower()
    words = rest[rest.isin(YES | NO)]
    values.loc[words.index, name] = words.isin(YES).astype(float)
    return len(words) > 0
