"""CSV that people open in a spreadsheet (RFC 4180): UTF-8 with a byte order mark, without which
Excel reads something else; every cell in quotes; no cell a formula.

A spreadsheet runs what begins with = + - or @, whoever wrote it: a name, say. Such a cell gets an
apostrophe in front (OWASP, CSV injection), which spreadsheets take for "this is text".
"""

import csv
import io
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from app.inert import visible

CSV_MEDIA_TYPE = "text/csv"
CSV_HEADERS: Mapping[str, str] = {"Content-Type": "text/csv; charset=utf-8; header=present"}
_BOM = "\ufeff"
_FORMULA = "=+-@−"
_LEADING_CONTROLS = "\t\r\n"


def csv_head(columns: Sequence[str]) -> bytes:
    """The byte order mark and the line of names."""
    return _BOM.encode() + csv_rows([columns])


def csv_rows(rows: Iterable[Sequence[str]]) -> bytes:
    """Lines of a CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerows([visible(as_text(cell)) for cell in row] for row in rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def as_text(cell: str) -> str:
    """A cell that no spreadsheet runs.

    What it could skip in front is looked through (spaces, quotes, what can't be seen), and
    full-width signs count as the plain ones that some make of them.
    """
    if cell[:1] and cell[0] in _LEADING_CONTROLS:
        return f"'{cell}"
    for character in cell:
        plain = unicodedata.normalize("NFKC", character)
        if plain[:1] in tuple(_FORMULA):
            return f"'{cell}"
        skipped = unicodedata.category(character)[0] in "ZC" or character in "'\""
        if not skipped:
            return cell
    return cell
