"""What the words of a text are, to be found again: the terms of BM25 files and of queries. As `embeddings.words` of
sql/schema has them in PostgreSQL.

White space and punctuation part words. Those that a hyphen, an apostrophe or the like joins are there as one word, too:
`B-52` is b, 52 and b52, so that codes and names are found as they are typed, before texts that have the parts alone.
"""

import re
import threading
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache

import Stemmer

from embeddings_pipeline.config.words import SIMPLE, WordsDefinition

# Of ASCII, Latin-1, Arabic, Devanagari, general punctuation but for the joiners within words, CJK, full width; and what
# no database can hold.
PUNCTUATION = (
    r"\0\ud800-\udfff!-/:-@\[-`{-~\u00a0-\u00bf\u060c\u061b\u061f\u0964\u2000-\u200b\u200e-\u206f\u3000-\u3003\u3008-\u3011"
    r"\uff01-\uff0f\uff1a-\uff20"
)
JOINERS = r"'./_@&\u2010\u2011\u2019\u02bc-"
WORD = re.compile(rf"[^\s{PUNCTUATION}]+(?:[{JOINERS}][^\s{PUNCTUATION}]+)*")  # joined words are one match
LONGEST_TERM = 500  # characters: what is longer is no word
MOST_TERMS = 500  # of a query: its first ones

# bm25s calls them by their codes.
STOP_WORDS = {
    "danish": "DANISH",
    "dutch": "DUTCH",
    "english": "EN_PLUS",
    "french": "FRENCH",
    "german": "GERMAN",
    "italian": "ITALIAN",
    "norwegian": "NORWEGIAN",
    "portuguese": "PORTUGUESE",
    "russian": "RUSSIAN",
    "spanish": "SPANISH",
    "swedish": "SWEDISH",
    "turkish": "TURKISH",
}
_stemmers = threading.local()  # one is not for several threads at once


def words_of(text: str) -> Iterator[str]:
    """The words, in order, joined ones as they are typed."""
    return (match.group() for match in WORD.finditer(text.lower()))


def terms_of_word(word: str, stem: str | None) -> list[str]:
    """The terms of a word of `words_of`: its parts, and the whole. stem: the stemmer's language; None for none."""
    word = unicodedata.normalize("NFKC", word)
    parts = re.split(rf"[\s{PUNCTUATION}]+", word)
    terms = [part for part in parts if part and len(part) <= LONGEST_TERM]
    if len(parts) > 1 and len(joined := "".join(parts)) <= LONGEST_TERM:
        terms.append(joined)
    return [_stemmer(stem).stemWord(term) for term in terms] if stem else terms


def query_words(query: str, words: WordsDefinition) -> list[str]:
    """The words of a query that are to be looked for, each once, in lower case and not stemmed; at most MOST_TERMS.

    Stop words are left out, unless there are no others.
    """
    stop_words = stop_words_of(words)
    every: dict[str, None] = {}
    for word in words_of(query):
        every.update(dict.fromkeys(terms_of_word(word, None)))
        if len(every) > 2 * MOST_TERMS:
            break
    wanted = [word for word in every if word not in stop_words] or list(every)
    return wanted[:MOST_TERMS]


def stems_of(words: Iterable[str], stem: str | None) -> list[str]:
    """The terms of such words, each once."""
    return list(dict.fromkeys(_stemmer(stem).stemWord(word) for word in words)) if stem else list(dict.fromkeys(words))


@lru_cache
def stop_words_of(words: WordsDefinition) -> frozenset[str]:
    """The words that a query is freed of."""
    if words.stop_words is not None:
        return frozenset(word.lower() for word in words.stop_words)
    if words.language == SIMPLE or words.language not in STOP_WORDS:
        return frozenset()
    from bm25s import stopwords

    return frozenset(getattr(stopwords, f"STOPWORDS_{STOP_WORDS[words.language]}"))


def _stemmer(language: str) -> Stemmer.Stemmer:
    if not hasattr(_stemmers, language):
        setattr(_stemmers, language, Stemmer.Stemmer(language))
    stemmer: Stemmer.Stemmer = getattr(_stemmers, language)
    return stemmer
