"""A `defs.yaml` is changed in one line, or not at all."""

import os
from pathlib import Path

import pytest

from embeddings_pipeline.config.editing import may_write_profile, write_name, write_profile
from embeddings_pipeline.config.settings import PACKAGE_DEFS
from embeddings_pipeline.errors import ConfigurationError


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "  name: a\r\n  profile: x  # why\r\n  columns: [b]\r\n",
            "  name: a\r\n  profile: wide  # why\r\n  columns: [b]\r\n",
        ),
        ("  name: a\n  columns: [b]", "  name: a\n  profile: wide\n  columns: [b]"),
        ("  name: a\n  profile: {name: x}\n", None),
        ("  name: a\n  profile: &p x\n  columns: [*p]\n", None),
        ("  name: a\n  profile: 'x # y'\n", "  name: a\n  profile: 'wide'\n"),
        ('  name: a\n  profile: "x"   # why\n', '  name: a\n  profile: "wide"   # why\n'),
        (
            "  name: a\n  columns:\n    - b   # first\n\n    - c\n",
            "  name: a\n  profile: wide\n  columns:\n    - b   # first\n\n    - c\n",
        ),
        ("  name: a\n  columns:\n  - b\n  - c\n", "  name: a\n  profile: wide\n  columns:\n  - b\n  - c\n"),
        ("  name: a\n  columns: [ b,c ]\n", "  name: a\n  profile: wide\n  columns: [ b,c ]\n"),
        ("  name: a\n  profile: |\n    x\n", None),
    ],
)
def test_the_definition_is_changed_in_one_place_or_not_at_all(tmp_path: Path, before: str, after: str | None) -> None:
    path = tmp_path / "defs.yaml"
    path.write_bytes(f"type: t\nattributes:\n{before}".encode())
    assert may_write_profile(path, "a", "wide") == (after is not None)
    if after is None:
        with pytest.raises(ConfigurationError, match="by hand"):
            write_profile(path, "a", "wide")
        after = before
    else:
        write_profile(path, "a", "wide")
    assert path.read_bytes() == f"type: t\nattributes:\n{after}".encode()


def test_a_destinations_profile_is_changed_in_its_own_line(tmp_path: Path) -> None:
    path = tmp_path / "defs.yaml"
    path.write_text("type: t\nattributes:\n  name: a\n  destination: {table: t, profile: x}\n  # end\n")
    write_profile(path, "a", "wide", in_destination=True)
    assert path.read_text() == "type: t\nattributes:\n  name: a\n  destination: {table: t, profile: wide}\n  # end\n"


def test_the_profile_of_one_of_several_collections_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "defs.yaml"
    text = "type: t\nattributes:\n  name: a\n  profile: x\n---\ntype: t\nattributes:\n  name: b\n  profile: x\n"
    path.write_text(text)
    write_profile(path, "b", "wide")
    assert path.read_text() == text.removesuffix("x\n") + "wide\n"


def test_the_name_of_one_of_several_collections_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "defs.yaml"
    text = "type: t\nattributes:\n  name: a  # one\n---\ntype: t\nattributes:\n  name: b\n  columns: [c]\n"
    path.write_text(text)
    write_name(path, "b", "c")
    assert path.read_text() == text.replace("name: b", "name: c")
    with pytest.raises(ConfigurationError, match="by hand"):
        write_name(path, "nowhere", "d")


def test_the_definition_that_comes_with_the_package_keeps_every_byte_but_its_name(tmp_path: Path) -> None:
    [shipped] = PACKAGE_DEFS.rglob("defs.yaml")
    path = tmp_path / "defs.yaml"
    path.write_bytes(shipped.read_bytes())
    write_name(path, "items", "films")
    assert path.read_bytes() == shipped.read_bytes().replace(b"name: items", b"name: films", 1)


def test_a_file_that_cannot_be_written_whole_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "defs.yaml"
    path.write_text("type: x\nattributes:\n  name: films\n")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigurationError, match=r"set `name: movies` there by hand.*No space left"):
        write_name(path, "films", "movies")
    assert path.read_text() == "type: x\nattributes:\n  name: films\n" and list(tmp_path.iterdir()) == [path]


def test_a_name_that_is_written_already_is_left(tmp_path: Path) -> None:
    path = tmp_path / "defs.yaml"
    path.write_text("type: x\nattributes:\n  name: movies\n")
    write_name(path, "films", "movies")
    assert path.read_text() == "type: x\nattributes:\n  name: movies\n"
