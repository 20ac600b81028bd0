"""Long texts in pieces."""

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from embeddings_pipeline.config.chunks import split_chunks

FAMILY, FLAG, ACCENTED = "👨\u200d👩\u200d👧\u200d👦", "🇩🇪", "e\u0301\u0323"
HANGUL, CONJUNCT = "\u1100\u1161\u11a8", "क्ष"


@given(st.text(st.characters(codec=None), max_size=300), st.integers(1, 60), st.data())
def test_chunks_lose_nothing_and_none_is_longer_than_asked(text, characters, data):
    overlap = data.draw(st.integers(0, characters // 2))
    text = text.strip()
    chunks = split_chunks(text, characters, overlap)
    assert all(len(chunk) <= characters or regex.fullmatch(r"\X", chunk) for chunk in chunks)
    assert all(chunk in text for chunk in chunks)
    place = 0
    for chunk in chunks:  # each begins before or where what is covered ends, but for white space
        starts = [n for n in range(len(text)) if text.startswith(chunk, n) and not text[place:n].strip()]
        place = max(place, max(starts, default=0) + len(chunk))
    assert text[place:].strip() == ""


@given(st.lists(st.text("abcd", min_size=1, max_size=9), min_size=1, max_size=80), st.integers(20, 60))
def test_without_overlap_words_are_never_cut(words, characters):
    chunks = split_chunks(" ".join(words), characters)
    assert " ".join(chunks).split() == words


def test_a_megabyte_of_text_is_cut_in_no_time_and_overlaps_as_asked():
    text = "word " * 200_000
    chunks = split_chunks(text.strip(), 1000, 100)
    assert len(chunks) < 1200
    assert chunks[1].startswith(chunks[0][-90:].split(" ", 1)[1][:40])
    assert len(split_chunks("x" * 1_000_000, 1000)) == 1000


def test_without_chunking_there_is_one_text_blank_or_not():
    assert split_chunks("", None) == [""]
    assert split_chunks("", 50) == [""]
    assert split_chunks("short", 50, 10) == ["short"]


@pytest.mark.parametrize(
    "space", ["\t", "\u00a0", "\u2028", "\u2029", "\u3000", "\r\n", "\x85", "\u202f", "\u2003", " "]
)
def test_chunks_end_and_overlap_at_any_white_space(space):
    words = [f"word{n}" for n in range(100)]
    assert space.join(split_chunks(space.join(words), 50)).split() == words
    assert all(set(chunk.split()) <= set(words) for chunk in split_chunks(space.join(words), 50, 20))


@pytest.mark.parametrize("overlap", [5, 10, 25])
def test_an_overlap_begins_at_a_word_and_is_left_out_if_the_last_word_is_longer(overlap):
    words = ["antidisestablishmentarianism", "a", "of", "honorificabilitudinitatibus"] * 20
    chunks = split_chunks(" ".join(words), 50, overlap)
    assert all(set(chunk.split()) <= set(words) for chunk in chunks)


@pytest.mark.parametrize("character", [FAMILY, FLAG, ACCENTED, HANGUL, CONJUNCT, "1\ufe0f\u20e3", "각", "நி"])
@pytest.mark.parametrize("overlap", [0, 7, 20])
def test_what_a_reader_takes_for_one_character_is_never_cut(character, overlap):
    for before in range(len(character)):
        text = "x" * before + character * 60
        for chunk in split_chunks(text, 50, overlap):
            assert len(chunk) <= 50
            assert chunk.lstrip("x").replace(character, "") == ""


@given(
    st.lists(
        st.sampled_from([FAMILY, FLAG, ACCENTED, HANGUL, CONJUNCT, "a", "b ", "\r\n", "字", "\u3000"]), max_size=80
    ),
    st.data(),
)
def test_every_chunk_is_whole_characters_and_they_cover_the_text(pieces, data):
    text = "".join(pieces).strip()
    characters = data.draw(st.integers(11, 60))
    chunks = split_chunks(text, characters, data.draw(st.integers(0, characters // 2)))
    whole = set(regex.findall(r"\X", text))
    assert all(len(chunk) <= characters for chunk in chunks)
    assert all(character in whole for chunk in chunks for character in regex.findall(r"\X", chunk))


def test_without_overlap_every_character_is_in_exactly_one_chunk():
    text = f"{FAMILY}{FLAG}{FLAG}字{ACCENTED}{HANGUL}" * 50
    assert "".join(split_chunks(text, 50)) == text


def test_one_character_that_is_longer_than_a_chunk_stays_whole():
    text = "a" + "\u0301" * 80
    assert split_chunks(f"{text} b {text}", 50) == [text, "b", text]
