"""A CSV file as columns of text, every cell as it is written; an empty cell, quoted or not, is None."""

import codecs
import csv
import io
import sys
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path

import pandas as pd

from embeddings_pipeline.errors import SourceError
from embeddings_pipeline.store.file_column import FileColumn
from embeddings_pipeline.wording import counted

SEPARATORS = ",;\t|"
MOST_HEADER = 1 << 20  # characters: more than 1,600 columns, the most that a table has


def read_csv(path: Path, key: Sequence[str]) -> list[FileColumn]:
    """The columns that the header names. The separator is the first of `,` `;` tab `|` by which it has the key.

    SourceError for what is not UTF-8 or not a CSV: a row with too many or too few cells, a quote that does not end.
    """
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    text = _text(path, data)
    separator = _separator(text, key)
    _check(path, text, separator)
    single = separator not in text
    frame = pd.read_csv(
        io.BytesIO(data),
        sep=separator,
        header=None,  # a header would have its names changed, and a first column taken for an index
        dtype=object,  # the text of each cell, as Python's `str`
        keep_default_na=False,
        na_filter=False,
        skip_blank_lines=not single,
        low_memory=False,
    )
    if single:
        frame = frame[frame[0] != ""]  # in a file of one column a blank line is no row, but white space is a cell
    columns: list[list[str]] = [frame[number].tolist() for number in frame.columns]
    return [FileColumn(cells[0], None, _texts(cells[1:])) for cells in columns]


def _texts(cells: list[str]) -> Callable[[str], list[str | None]]:
    return lambda _type: [cell or None for cell in cells]


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SourceError(
            f"{path}: not a CSV (UTF-8, with a header) or Parquet file: line {line} has bytes that are no UTF-8; "
            "save it as UTF-8"
        ) from error


def _separator(text: str, key: Sequence[str]) -> str:
    for separator in SEPARATORS:
        rows = csv.reader(io.StringIO(text[:MOST_HEADER], newline=""), delimiter=separator)
        if set(key) <= set(next(filter(None, rows), [])):
            return separator
    return SEPARATORS[0]


def _check(path: Path, text: str, separator: str) -> None:
    """Refuse what pandas would take in silence: a row that is too short, and a quote inside a quoted cell."""
    most, header, row = csv.field_size_limit(sys.maxsize), None, 0
    try:
        for cells in csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True):
            if not cells or (len(cells) == 1 and not cells[0].strip()):
                continue
            if header is None:
                header = cells
                continue
            row += 1
            if len(cells) != len(header):
                raise SourceError(
                    f"{path}: row {row} has {len(cells)} cells, and the header names {counted(len(header), 'column')}"
                    f"{_last(header, cells)}; correct it, or quote a cell that has the separator {separator!r}"
                )
    except csv.Error as error:
        raise SourceError(
            f"{path}: not a CSV (UTF-8, with a header) or Parquet file: row {row + 1}: {error}; a quoted cell ends "
            'with its quote, and a quote inside it is written twice ("")'
        ) from error
    finally:
        csv.field_size_limit(most)
    if header is None:
        raise SourceError(f"{path}: not a CSV (UTF-8, with a header) or Parquet file: there is nothing in it")


def _last(header: list[str], cells: list[str]) -> str:
    """Where it went wrong, as far as that can be known."""
    missing = [name for name, cell in zip_longest(header, cells) if cell is None and name is not None]
    return f" (column {missing[0]!r} is missing)" if missing else f" (after column {header[-1]!r})"
