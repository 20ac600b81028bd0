"""A CSV's cells as they are written, by whatever separator, quotes and line ends."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embeddings_pipeline.store.csv_file import read_csv

CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8) | st.sampled_from(
    ["007", "1e5", "NaN", "None", "N/A", "true", " 1", "\t", '"', "\r\n", "\ufeff", "#", "\\N"]
)


def cells(path: Path, key: str = "id") -> dict[str, list[str | None]]:
    return {column.name: column.texts("text") for column in read_csv(path, (key,))}


@given(
    rows=st.lists(st.tuples(CELLS, CELLS), max_size=5),
    separator=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    mark=st.sampled_from(["", "\ufeff"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    first=st.booleans(),
)
def test_whatever_is_written_is_read_and_the_empty_cell_is_none(
    tmp_path_factory, rows, separator, end, mark, quoting, first
):
    if any(end in cell for row in rows for cell in row for end in "\r\n"):
        quoting = csv.QUOTE_ALL  # the writer quotes its own line ends only
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=separator, lineterminator=end, quoting=quoting)
    table = [("id", "a", "b"), *((number, *row) for number, row in enumerate(rows))]
    writer.writerows(table if first else [(a, b, number) for number, a, b in table])
    path = tmp_path_factory.mktemp("csv") / "any.csv"
    path.write_bytes((mark + file.getvalue()).encode())
    assert cells(path) == {
        "id": [str(number) for number in range(len(rows))],
        "a": [a or None for a, _ in rows],
        "b": [b or None for _, b in rows],
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("id,t\n1,\n2,\"\"\n", {"id": ["1", "2"], "t": [None, None]}),
        ("id,t\n\n 1, a \n   \n2,b\n\n", {"id": [" 1", "2"], "t": [" a ", "b"]}),
        ("t\tid\n\t1\n", {"t": [None], "id": ["1"]}),
        ("id\n1\n\n  \n", {"id": ["1", "  "]}),
        ("id,t\n1,5\" disk\n", {"id": ["1"], "t": ['5" disk']}),
        ('"a,b";id\n1,5;2\n', {"a,b": ["1,5"], "id": ["2"]}),
        ("id,a;b\n1,c;d\n", {"id": ["1"], "a;b": ["c;d"]}),
        ("id,t\n1," + "x" * 300_000 + "\n", {"id": ["1"], "t": ["x" * 300_000]}),
    ],
)  # fmt: skip
def test_blanks_white_space_and_separators_inside_cells(tmp_path, text, expected):
    (tmp_path / "f.csv").write_text(text)
    assert cells(tmp_path / "f.csv") == expected
