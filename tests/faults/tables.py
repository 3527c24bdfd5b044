"""Area tables: label tables, spreadsheets and configs with odd cells, keys and bytes."""

import io
import json
import zipfile
from functools import cache
from pathlib import Path

from tests.faults.models import places
from tests.faults.mutations import NAMES, TEXTS, damaged, nested, odd_value
from tests.faults.stores import compare, home, predict_line, small_cohort
from tests.faults.worker import Case, one_line, run


def base(area):
    return home()


@cache
def workbook():
    """The label table as an Excel sheet."""
    import openpyxl

    book = openpyxl.Workbook()
    for line in (home() / "labels.csv").read_text().splitlines():
        book.active.append(line.split(","))
    buffer = io.BytesIO()
    book.save(buffer)
    return buffer.getvalue()


def with_cell(sheet, place, number=1):
    """An Excel file with one more cell at a place, such as XFD1048576, of a sheet."""
    row = "".join(c for c in place if c.isdigit())
    cell = f'<row r="{row}"><c r="{place}"><v>1</v></c></row></sheetData>'.encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(sheet)) as a, zipfile.ZipFile(buffer, "w") as b:
        for name in a.namelist():
            data = a.read(name)
            b.writestr(
                name, data.replace(b"</sheetData>", cell) if f"sheet{number}.xml" in name else data
            )
    return buffer.getvalue()


def odd_cells(text, rng):
    """A label table with one cell, name, delimiter, quote or row that does not belong."""
    lines = text.splitlines()
    row, draw = int(rng.integers(len(lines))), rng.random()
    cells = lines[row].split(",")
    odd = TEXTS[int(rng.integers(len(TEXTS)))]
    if draw < 0.6:
        cells[int(rng.integers(len(cells)))] = odd
        lines[row] = ",".join(cells)
        return "cell", "\n".join(lines)
    if draw < 0.7:
        lines.insert(row, odd)
        return "line", "\n".join(lines)
    if draw < 0.8:
        lines[row] += str(rng.choice([",", '"', ",1", "'", ";", ',"a\nb']))
        return "end of a line", "\n".join(lines)
    if draw < 0.85:
        one = int(rng.integers(len(cells)))
        rows = [line.split(",") for line in lines]
        rows = [rows[0], *([odd if i == one else x for i, x in enumerate(r)] for r in rows[1:])]
        return "a whole column", "\n".join(map(",".join, rows))
    if draw < 0.9:
        return "columns", "\n".join(",".join([line] * 300) for line in lines)
    pad = str(rng.choice([",", ";", "\n", "\r", " ", '"']))
    return "delimiters", text.replace(",", pad * int(rng.integers(1, 4)))


def odd_config(config, rng):
    found = list(places(config))
    path = found[int(rng.integers(len(found)))]
    holder = config
    for key in path[:-1]:
        holder = holder[key]
    draw = rng.random()
    if draw < 0.15:
        del holder[path[-1]]
    elif draw < 0.3 and isinstance(holder, dict):
        names = [*NAMES, *TEXTS]
        holder[names[int(rng.integers(len(names)))]] = holder.pop(path[-1])
    else:
        holder[path[-1]] = odd_value(rng)
    return "config: value"


def encode(value):
    """What JSON has no word for, as text."""
    return repr(value)


def tables(rng, here, base):
    """A label table or config of `evaluate` and `predict`; `check` must go on to its end."""
    small_cohort(here, base)
    draw, name = rng.random(), "labels.csv"
    if draw < 0.35:
        fault, text = odd_cells(Path(name).read_text(), rng)
        Path(name).write_text(text, errors="surrogatepass")
    elif draw < 0.5:
        fault, data = damaged(Path(name).read_bytes(), rng)
        Path(name).write_bytes(data)
    elif draw < 0.65:
        fault, data = damaged(workbook(), rng)
        if rng.random() < 0.2:
            place = str(rng.choice(["XFD1048576", "A1048577", "XFD9", "A99999999999", "B999999"]))
            fault, data = "far cell", with_cell(workbook(), place)
        fault = f"sheet: {fault}"
        Path(name).write_bytes(data)
    elif draw < 0.75:
        name = "config.json"
        fault, data = damaged(Path(name).read_bytes(), rng)
        fault = f"config: {fault}"
        Path(name).write_bytes(data)
    else:
        name, config = "config.json", json.loads(Path("config.json").read_text())
        fault = odd_config(config, rng)
        text = json.dumps(config, default=encode, skipkeys=True)
        if rng.random() < 0.05:
            fault, text = "config: nested", json.dumps(nested(900)).replace("[", "[" * 100)
        Path(name).write_text(text, errors="surrogatepass")
    line = predict_line() if rng.random() < 0.7 else ["check", "--device", "cpu"]
    result = run(*line)
    names = "labels.csv", "config", "a run would fail", "emb", "defect", "task", "dataset"
    complaint = one_line(result, *names)
    if line[0] == "predict" and not complaint and not result.status and "label_path" not in fault:
        complaint = compare(base, "", (), False)
    return Case(fault, complaint)
