"""Judged queries from files as people have them: our lines, BEIR folders, TREC topics with qrels; and wrong ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from embeddings_pipeline.errors import ConfigurationError
from embeddings_pipeline.search.judgements import Judgements, read_judgements

TOPICS = """<top>
<num> Number: 301
<title> Topic: International &amp; Organized
 Crime
<desc> Description:
Identify organizations.
</top>
<top>
<num> Number: 302 </num>
<title> </title>
<desc> Description: Is the polio
disease under control? </desc>
</top>
"""
COVID = '<topics><topic number="1"><query>virus origin</query><question>what is it</question></topic></topics>'


def written(folder: Path, name: str, text: str | bytes) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def lines(*queries: Any) -> str:
    return "\n".join(map(json.dumps, queries))


def as_pairs(judgements: Judgements) -> list[tuple[str, dict[str, int]]]:
    return [(query.text, dict(query.relevant)) for query in judgements.queries]


def why(path: Path, qrels: Path | None = None) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read_judgements(path, qrels)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_our_lines_name_keys_or_keys_with_grades(tmp_path: Path) -> None:
    text = lines(
        {"query": "a", "relevant": [1, "x y", ["7", "de"], 1]},
        {"query": "b", "relevant": {"1": 3, "2": 0, "3": -1, "4": 1.0}, "id": 9},
    )
    expected = [("a", {"1": 1, "x y": 1, '["7", "de"]': 1}), ("b", {"1": 3, "4": 1})]
    assert as_pairs(read_judgements(written(tmp_path, "golden.jsonl", f"\ufeff\r\n{text}\r\n\n"))) == expected
    assert as_pairs(read_judgements(written(tmp_path, "queries.jsonl", text).parent)) == expected


def test_queries_without_a_relevant_item_are_left_out_and_told(tmp_path: Path) -> None:
    text = lines(
        {"query": "a", "relevant": ["1"]}, {"query": "b", "relevant": {"1": 0}}, {"query": "c", "relevant": {"1": -2}}
    )
    judgements = read_judgements(written(tmp_path, "golden.jsonl", text))
    assert [query.text for query in judgements.queries] == ["a"]
    assert judgements.notes == ("2 queries without a relevant item are left out",)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"query": "a"}, "it lacks 'relevant'"),
        ({"relevant": ["1"]}, "it lacks 'query'"),
        ({"query": " ", "relevant": ["1"]}, "not blank"),
        ({"query": 7, "relevant": ["1"]}, "not blank"),
        ({"query": "a", "relevant": []}, "at least one key"),
        ({"query": "a", "relevant": "12"}, "at least one key"),
        ({"query": "a", "relevant": [None]}, "item_key cannot be None"),
        ({"query": "a", "relevant": {"1": 0.5}}, "whole number"),
        ({"query": "a", "relevant": {"1": float("nan")}}, "whole number"),
        ({"query": "a", "relevant": {"1": True}}, "whole number"),
        ({"query": "a", "relevant": {"1": "many"}}, "many"),
        ({"query": "a", "relevant": {"1": 10**9}}, "up to 1000"),
        ({"query": "a", "relevant": {"1": 10**400}}, "too large"),
        (["a", "1"], "list"),
    ],
)
def test_a_wrong_line_is_named_with_what_is_wrong(tmp_path: Path, line: Any, said: str) -> None:
    first = {"query": "a", "relevant": ["1"]}
    told = why(written(tmp_path, "golden.jsonl", lines(first, line)))
    assert "golden.jsonl, line 2: a line is" in told and said in told


def test_files_that_are_none_of_these_are_told(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in why(tmp_path / "gone.jsonl")
    assert "it has no query" in why(written(tmp_path, "empty.jsonl", " \n"))
    assert "line 2: it is not UTF-8" in why(written(tmp_path, "latin.jsonl", '{}\n"\xe4"'.encode("latin-1")))
    assert "has no queries.jsonl" in why(tmp_path)
    assert "line 1" in why(written(tmp_path, "half.jsonl", '{"query": "a", "rel'))
    assert "line 1" in why(written(tmp_path, "deep.jsonl", '{"query": ' + "[" * 100_000))
    topics = written(tmp_path, "topics.txt", TOPICS)
    assert "`--qrels FILE`" in why(topics)
    golden = written(tmp_path, "golden.jsonl", lines({"query": "a", "relevant": ["1"]}))
    assert "leave `--qrels` out" in why(golden, topics)


# --- BEIR ----------------------------------------------------------------------------------------------------------

BEIR = lines(*({"_id": f"q{n}", "text": f"question {n}", "metadata": {}} for n in range(1, 4)))
HEAD = "query-id\tcorpus-id\tscore\n"


def test_a_beir_folder_has_its_test_split(tmp_path: Path) -> None:
    written(tmp_path, "queries.jsonl", BEIR)
    written(tmp_path, "qrels/train.tsv", f"{HEAD}q3\td9\t1\n")
    written(tmp_path, "qrels/test.tsv", f"{HEAD}q1\td 1\t2\nq1\td2\t0\nq2\td3\t1\r\n")
    judgements = read_judgements(tmp_path)
    assert as_pairs(judgements) == [("question 1", {"d 1": 2}), ("question 2", {"d3": 1})]
    assert judgements.notes == ("1 query without a relevant item is left out",)
    assert as_pairs(read_judgements(tmp_path, tmp_path / "qrels" / "train.tsv")) == [("question 3", {"d9": 1})]
    assert read_judgements(tmp_path / "queries.jsonl") == judgements


def test_a_beir_folder_without_the_test_split(tmp_path: Path) -> None:
    written(tmp_path, "queries.jsonl", BEIR)
    assert "is not there" in why(tmp_path)
    written(tmp_path, "qrels/dev.tsv", f"{HEAD}q1\td1\t1\n")
    assert as_pairs(read_judgements(tmp_path)) == [("question 1", {"d1": 1})]
    written(tmp_path, "qrels/train.tsv", f"{HEAD}q1\td1\t1\n")
    assert "has dev.tsv, train.tsv: name a file" in why(tmp_path)
    written(tmp_path, "queries.jsonl", f"{BEIR}\n{lines({'_id': 'q1', 'text': 'again'})}")
    assert "two queries have the id 'q1'" in why(tmp_path, tmp_path / "qrels" / "dev.tsv")


# --- TREC ----------------------------------------------------------------------------------------------------------


def test_trec_topics_with_judgements_by_tabs_with_ties_and_grades_of_0(tmp_path: Path) -> None:
    topics = written(tmp_path, "topics.301-450", TOPICS)
    rows = ["301\t0\tFT1\t1", "301 0  FT2\t 1", "301\t0\tFT3\t0", "301 0 FT4 -2", "302\tQ0\tFT1\t2", "", "999 0 FT1 1"]
    judgements = read_judgements(topics, written(tmp_path, "qrels.txt", "\r\n".join(rows)))
    assert as_pairs(judgements) == [
        ("International & Organized Crime", {"FT1": 1, "FT2": 1}),
        ("Is the polio disease under control?", {"FT1": 2}),
    ]
    assert judgements.notes == ("qrels.txt judges 1 query that is not in topics.301-450, such as '999'",)


def test_topics_in_other_forms(tmp_path: Path) -> None:
    qrels = written(tmp_path, "qrels.txt", "1 0 d1 1\n2 0 d2 1\n")
    one = read_judgements(written(tmp_path, "covid.xml", COVID), qrels)
    assert [query.text for query in one.queries] == ["virus origin"]
    two = read_judgements(written(tmp_path, "topics.tsv", "1\ttop 10\n2\tbest of 10\n"), qrels)
    assert as_pairs(two) == [("top 10", {"d1": 1}), ("best of 10", {"d2": 1})]


def test_an_item_that_is_judged_twice_has_the_higher_grade(tmp_path: Path) -> None:
    topics = written(tmp_path, "topics.tsv", "1\ta\n")
    qrels = written(tmp_path, "qrels.txt", "1 0 d1 2\n1 0 d1 1\n1 0 d1 2\n1 0 d2 1\n1 0 d2 1\n")
    judgements = read_judgements(topics, qrels)
    assert as_pairs(judgements) == [("a", {"d1": 2, "d2": 1})]
    assert judgements.notes == ("1 judgement of qrels.txt gives another grade: the higher counts",)


def test_wrong_topics_and_judgements_are_named(tmp_path: Path) -> None:
    qrels = written(tmp_path, "qrels.txt", "1 0 d1 1\n")
    topics = written(tmp_path, "topics.tsv", "1\ta\n")
    assert "line 1: a line is a query's id" in why(written(tmp_path, "words.txt", "no tab here"), qrels)
    assert "line 1" in why(written(tmp_path, "bare.tsv", "\tno id\n"), qrels)
    assert "which `--qrels` takes" in why(qrels, qrels)
    assert "2 topics begun by <top>, 1 ended by </top>" in why(
        written(tmp_path, "cut.txt", f"{TOPICS.partition('</top>')[0]}<top>\n</top>"), qrels
    )
    assert "topic 1 (without number) has no <num>" in why(
        written(tmp_path, "a.txt", "<top><title>a</title></top>"), qrels
    )
    assert "topic 1 (7) has no <title>" in why(written(tmp_path, "b.txt", "<top><num>7<narr>x</top>"), qrels)
    assert "none has a relevant item" in why(topics, written(tmp_path, "zero.txt", "1 0 d1 0\n"))
    for row in ("1 0 d1", "1 0 d1 x", "1 0 d1 0.5", "1 0 d1 1 run", "1 0 d1 5000"):
        assert "wrong.txt, line 2: a line is query, item and grade" in why(
            topics, written(tmp_path, "wrong.txt", f"1 0 d2 1\n{row}\n")
        ), row
