"""Tables in every format are read correctly, or refused with the line."""

import csv
import io
import sys

import numpy as np
import pandas as pd
import pytest

from echofocus_core.base import tables
from echofocus_core.base.console import Collected, Findings, UserError

PLAIN = [["pid", "eid", "VSD"], ["P0", "001", "1"], ["P1", "002", "0.5"]]
TEXT = "pid,eid,VSD\nP0,001,1\nP1,002,0.5\n"
WIDE = "".join(f"{a}\n" for a in ("pid\teid\tVSD", "P0\t001\t1", "P1\t002\t0.5"))


def read(path, content):
    """(table, notes) of a file with that text or bytes."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    listener = Collected()
    table = tables.read_table(path, listener)
    return table, [f.text for f in listener.findings]


READ_AS_PLAIN = {  # content; part of the note
    "plain": (TEXT, ""),
    "CRLF": (TEXT.replace("\n", "\r\n"), ""),
    "UTF-8 with its mark": (TEXT.encode("utf-8-sig"), ""),
    "UTF-16": (TEXT.encode("utf-16"), "utf-16"),
    "semicolons": (TEXT.replace(",", ";"), "semicolons"),
    "tabs": (WIDE, "tabs"),
    "bars": (TEXT.replace(",", "|"), "bars"),
    "quoted": ("".join(f'"{r[0]}","{r[1]}","{r[2]}"\n' for r in PLAIN), ""),
    "blanks": (TEXT.replace(",", " , "), ""),
    "blank lines": ("\n" + TEXT.replace("\n", "\n\n"), ""),
    "empty rows": (TEXT + ",,\n,,\n,,,,\n", ""),
    "an extra comma in each line": (TEXT.replace("\n", ",\n"), ""),
    "an extra comma in each row": ("pid,eid,VSD\nP0,001,1,\nP1,002,0.5,\n", ""),
    "names with invisible characters": (
        "\u200bp\ufeffid,e\u00adid,VSD\u200e\n" + TEXT[TEXT.index("\n") + 1 :],
        "",
    ),
    "an index without a name": (",pid,eid,VSD\n0,P0,001,1\n1,P1,002,0.5\n", "without a name (1)"),
}


@pytest.mark.parametrize("case", READ_AS_PLAIN)
def test_formats(tmp_path, case):
    """Every format gives the same cells; the detected format is reported."""
    content, note = READ_AS_PLAIN[case]
    table, findings = read(tmp_path / "t.csv", content)
    assert [list(table), *table.to_numpy().tolist()] == PLAIN
    assert [note in text for text in findings] == [True] * bool(note), findings


REFUSED = {  # content; part of the message
    "an extra comma in the first row": ("no,eid,VSD\n0,E0,1,\n1,E1,0\n", "line 2 has 4 fields"),
    "an extra comma in a later row": ("eid,VSD\nE0,1\nE1,0,\n", "line 3 has 3 fields"),
    "a missing field": ("pid,eid,VSD\nP0,E0,1\nP1,E1\n", "line 3 has 2 fields"),
    "an extra field in each row": ("eid,VSD\n0,E0,1\n1,E1,0\n", "line 2 has 3 fields"),
    "decimal commas between commas": ("pid,eid,EF\nP0,E0,40,5\nP1,E1,41\n", "line 2 has 4 fields"),
    "after a cell of two lines": ('eid,V\n"E\n0",1\nE1,0,1\n', "line 4 has 3 fields"),
    "two columns of a name": ("eid,VSD, VSD\nE0,1,0\n", "two columns 'VSD'"),
    "an open quote": ('eid,VSD\nE0,1\n"E1,0\nE2,1\n', 'line 3: a quote (") does not close'),
    "two open quotes": ('eid,VSD\n"E0,1\nE1,0\nE2",1\n', "line 2: a quote"),
    "blank lines only": ("\n\n", "is empty"),
    "only a header": ("pid,eid,VSD\n", "no rows"),
    "an old Excel file": (b"\xd0\xcf\x11\xe0" + bytes(100), "save it as CSV"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_tables(tmp_path, case):
    content, expected = REFUSED[case]
    with pytest.raises(UserError, match=r"t\.csv") as error:
        read(tmp_path / "t.csv", content)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_cells_that_hold_delimiters_quotes_and_lines(tmp_path):
    """Cells and names are those that Python's csv wrote, with each delimiter."""
    rows = [["pid", "eid", "a, b; c"], ["P,0", 'say "E"', "1;2\t3"], ["P\n1", "E|2", "ä"]]
    for delimiter in ",;\t|":
        text = io.StringIO()
        csv.writer(text, delimiter=delimiter).writerows(rows)
        table, _ = read(tmp_path / "t.csv", text.getvalue())
        assert [list(table), *table.to_numpy().tolist()] == rows
        assert list(table.index) == [2, 3]


def test_latin_1(tmp_path):
    table, note = read(tmp_path / "t.csv", "eid,Größe €\nE0,1\n".encode("cp1252"))
    assert list(table) == ["eid", "Größe €"] and "cp1252" in note[0]


def test_a_list_of_one_column_and_odd_paths(tmp_path):
    table, _ = read(tmp_path / "t.csv", "eid\n001\nNA\n002\n")
    assert table["eid"].tolist() == ["001", None, "002"] and list(table.index) == [2, 3, 4]
    with pytest.raises(UserError, match=r"no label table .*gone"):
        tables.read_table(tmp_path / "gone.csv", Findings(), "label table")
    with pytest.raises(UserError, match="no table"):
        tables.read_table(tmp_path, Findings())


def workbook(path, *sheets):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for i, rows in enumerate(sheets):
        sheet = book.active if i == 0 else book.create_sheet()
        for row in rows:
            sheet.append(row)
    book.save(path)


def test_excel(tmp_path):
    """Ids are text, empty sheets are skipped, and the index has the lines of the sheet."""
    path = tmp_path / "t.xlsx"
    rows = [["pid", "eid", "EF"], ["P0", 7, 55.0], [], ["P1", "008", 40.5], ["P2", "-A7", None]]
    workbook(path, [], rows, [["other"]])
    table, (note,) = read(path, path.read_bytes())
    assert table.to_numpy().tolist() == [["P0", "7", "55"], ["P1", "008", "40.5"],
                                         ["P2", "-A7", None]]  # fmt: skip
    assert list(table.index) == [2, 4, 5] and "the first of 2" in note
    for content in (b"PK\x03\x04" + bytes(100), path.read_bytes()[:-100]):
        with pytest.raises(UserError, match=r"t\.xlsx"):
            read(path, content)


def test_excel_without_openpyxl(tmp_path, monkeypatch):
    workbook(tmp_path / "t.xlsx", [["eid"]])
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(UserError, match="pip install openpyxl"):
        read(tmp_path / "t.xlsx", (tmp_path / "t.xlsx").read_bytes())


def numbers(**columns):
    """(values, findings) of columns of text."""
    listener = Collected()
    text = pd.DataFrame(columns, dtype=object)
    values = tables.to_numbers(text, "t.csv", listener)
    return values, [(f.level, f.text) for f in listener.findings]


@pytest.mark.parametrize(
    "cells, expected, note",
    [
        (["1", "2.5", "-3e2", " 4"], [1, 2.5, -300, 4], ""),
        (["40,0", "41,25", None], [40, 41.25, np.nan], "decimal commas in x"),
        (["0,125", "0,250"], [0.125, 0.25], "decimal commas in x"),
        (["49.9%", "60 %", None, "n/a"], [49.9, 60, np.nan, np.nan], "x: the % of its numbers"),
        (["49.9%", "0.6"], [np.nan, 0.6], ""),  # of which scale?
        (["1.234,5", "17,5"], [1234.5, 17.5], "decimal commas in x"),
        (["40,125", "41,5"], [40.125, 41.5], "decimal commas in x"),
        (["Yes", "no", "YES", None], [1, 0, 1, np.nan], "read as 1/0 in x"),
        (["present", "Absent", "maybe"], [1, 0, np.nan], "read as 1/0 in x"),
        (["55", "no", "60"], [55, np.nan, 60], ""),  # 'not measured' is not 0
        (["Ja", "nein", "j", None], [1, 0, 1, np.nan], "in x: j, ja = 1; nein = 0"),
        (["oui", "NON", "vrai", "faux"], [1, 0, 1, 0], "in x: oui, vrai = 1; faux, non = 0"),
        (["x", None, "x"], [1, np.nan, 1], "empty cells stay missing"),
        (["x", "1", "0"], [np.nan, 1, 0], ""),  # unknown
        (["inf", "1e999", "nan", "x"], [np.nan] * 4, ""),
        (["<5", "1_000", "0x10", "5 %"], [np.nan] * 4, ""),
    ],
)
def test_numbers(cells, expected, note):
    values, findings = numbers(x=cells)
    np.testing.assert_array_equal(values["x"], np.array(expected, float))
    assert [level for level, _ in findings] == ["ok"] * bool(note)
    assert note in "".join(text for _, text in findings)


@pytest.mark.parametrize(
    "columns",
    [
        {"x": ["1,234", "2,345"]},  # decimals or thousands?
        {"x": ["40,5", "41.5"]},
        {"x": ["1,234.5", "40,5"]},
        {"x": ["1,234,567", "1,234"]},
        {"x": ["40,5", "41,5"], "y": ["1.234", "2.345"]},  # y in decimal points, or thousands?
    ],
)
def test_ambiguous_numbers(columns):
    _, findings = numbers(**columns)
    errors = [text for level, text in findings if level == "ERROR"]
    assert len(errors) == 1 and "may be decimals or thousands" in errors[0]


def test_one_column_decides_how_another_is_read():
    values, _ = numbers(x=["40,5", "41,5"], y=["1,234", "2,345"])
    assert values["y"].tolist() == [1.234, 2.345]


@pytest.mark.parametrize(
    "cells, expected, order",
    [
        (["2020-03-01", "20191231", None], ["2020-03-01", "2019-12-31"], "year first"),
        (["2020-03-01 10:30:00", "2020-03-01T09:00"], ["2020-03-01 10:30", "2020-03-01 09:00"],
         "year first"),
        (["01.02.2020", "3.1.2020"], ["2020-02-01", "2020-01-03"], "day first"),
        (["01/02/2020", "13/02/2020"], ["2020-02-01", "2020-02-13"], "day first"),
        (["01/02/2020", "02/13/2020"], ["2020-01-02", "2020-02-13"], "month first"),
        (["01/02/2020", "02/03/2020"], None, "ambiguous"),
        (["2020-03-01", "unknown"], None, ""),
        (["1.5.20", "3.7.20"], None, ""),
    ],
)  # fmt: skip
def test_dates(cells, expected, order):
    dates, read_order = tables.read_dates(pd.Series(cells, dtype=object))
    assert read_order == order and (dates is None) == (expected is None)
    if expected:
        actual = dates.dropna().dt.tz_localize(None).tolist()
        assert actual == [pd.Timestamp(x) for x in expected]


def test_ages_of_dicom():
    cells = pd.Series(["018Y", "006M", "003W", "020D", "45", "45,5", None], dtype=object)
    expected = [18, 0.5, 21 / 365.25, 20 / 365.25, np.nan, np.nan, np.nan]
    np.testing.assert_allclose(tables.ages_to_years(cells), expected)


def test_ids():
    listener = Collected()
    column = pd.Series(["007", "123.0", ' ="0012"', "1.5", "A-1.0", None], name="eid", dtype=object)
    values = tables.clean_ids(column, "t.csv", listener)
    assert values[:5].tolist() == ["007", "123", "0012", "1.5", "A-1.0"] and not listener.findings
    cut = pd.Series(["12", "1.23E+11"], index=[2, 3], name="eid", dtype=object)
    tables.clean_ids(cut, "t.csv", listener)
    (finding,) = listener.findings
    assert finding.level == "ERROR" and "t.csv, line 3" in finding.text
