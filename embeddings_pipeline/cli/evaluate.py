"""`evaluate`: how good searches are, by judged queries, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import click
import typer

from embeddings_pipeline.cli.console import (
    CollectionOption,
    JsonOption,
    chosen_collection,
    print_json,
    printable,
    progress_bar,
    start_database,
    tell,
    waiting,
)
from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings, load_settings
from embeddings_pipeline.wording import counted

if TYPE_CHECKING:
    from embeddings_pipeline.search.arguments import Mode
    from embeddings_pipeline.search.evaluate import Evaluation, Index
    from embeddings_pipeline.search.judgements import Judgements
    from embeddings_pipeline.search.measures import Difference, Figure

SMOKE_TEST = (
    "a smoke test: it says whether searches find items by their own titles, and not how good they are; judged queries "
    "do (`--queries FILE`)"
)
LEAST_P = 0.001  # that is told as a number
QueriesOption = Annotated[
    Path | None,
    typer.Option(
        "--queries",
        metavar="PATH",
        help='Judged queries: JSON lines ({"query": "…", "relevant": ["key", …]}, or keys with grades), a BEIR folder, '
        "or TREC topics with --qrels. Left out: those of `evaluation:` in the defs.yaml.",
    ),
]
QrelsOption = Annotated[
    Path | None,
    typer.Option(
        "--qrels", metavar="FILE", help="The judgements of TREC topics, or others than BEIR's qrels/test.tsv."
    ),
]
SelfOption = Annotated[
    bool, typer.Option("--self", help="Ask for items by their own titles instead: a smoke test, without judgements.")
]
ProfilesOption = Annotated[
    list[str] | None, typer.Option("--profile", help="Only this one, also several; left out: each that is kept.")
]
IndexesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--index", click_type=click.Choice(["pgvector", "faiss"]), help="Only this one; left out: both, if they answer."
    ),
]
VectorsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--vectors",
        metavar="NAMES",
        help="Only these, `title`, or `title,overview` for a search in both; also several. Left out: each, and all "
        "together.",
    ),
]

ModesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--mode",
        click_type=click.Choice(["dense", "text", "hybrid"]),
        help="Only this one, also several; left out: each that the collection has indexes for.",
    ),
]
RerankOption = Annotated[
    bool | None,
    typer.Option(
        "--rerank/--no-rerank",
        help="Also with hits reranked. Left out: if `ENABLE_RERANKER` has searches reranked.",
    ),
]


def evaluate(
    queries: QueriesOption = None,
    qrels: QrelsOption = None,
    by_itself: SelfOption = False,
    collection_name: CollectionOption = None,
    profile: ProfilesOption = None,
    index: IndexesOption = None,
    vectors: VectorsOption = None,
    mode: ModesOption = None,
    rerank: RerankOption = None,
    as_json: JsonOption = False,
) -> None:
    """How good searches are, by judged queries: nDCG@10, recall@100, MRR, hit rate and latency of each way of searching
    side by side, with intervals of 95 % and a paired test against the first way.

    The exit code is 1 if `evaluation.least_ndcg` of the defs.yaml is missed, whose queries are asked.
    """
    settings = load_settings()
    definition = chosen_collection(collection_name)
    _check(definition, queries, qrels, by_itself)
    start_database(settings)
    from embeddings_pipeline.search.evaluate import choose_ways, floor_missed
    from embeddings_pipeline.search.evaluate import evaluate as run_evaluation

    judgements = _judgements(definition, settings, queries, qrels, by_itself)
    asked = [tuple(name.strip() for name in each.split(",")) for each in vectors or ()]
    with waiting("loading the model"):
        chosen = choose_ways(
            *(definition, settings, judgements),
            profiles=profile or (),
            indexes=cast("list[Index]", index or []),
            vectors=asked,
            modes=cast("list[Mode]", mode or []),
            rerank=rerank,
        )
    for line in chosen.told:
        tell(f"warning: {line}")
    with progress_bar("evaluate", show=not as_json, unit="query") as progress:
        evaluation = run_evaluation(definition, settings, judgements, chosen.ways, progress)
    for line in evaluation.told:
        tell(f"warning: {line}")
    if as_json:
        print_json(
            {
                **evaluation.as_dict(),
                "left_out": chosen.left_out,
                "uncovered": chosen.uncovered,
                "smoke_test": by_itself,
            }
        )
    else:
        _print(evaluation, SMOKE_TEST if by_itself else None)
    if queries is None and not by_itself and (missed := floor_missed(definition, evaluation)):
        tell(f"error: {missed}")
        raise typer.Exit(1)


def _check(definition: CollectionDefinition, queries: Path | None, qrels: Path | None, by_itself: bool) -> None:
    if by_itself and (queries or qrels):
        raise typer.BadParameter("--self asks for items by their own titles: leave --queries and --qrels out")
    if qrels and not queries:
        raise typer.BadParameter("--qrels has the judgements of the queries that --queries names")
    if queries is None and not by_itself and definition.attributes.evaluation is None:
        raise typer.BadParameter(
            f"collection {definition.name!r} has no `evaluation:` in its defs.yaml: give judged queries "
            "with --queries, or ask for items by their own titles with --self"
        )


def _judgements(
    definition: CollectionDefinition, settings: Settings, queries: Path | None, qrels: Path | None, by_itself: bool
) -> "Judgements":
    from embeddings_pipeline.search.evaluate import golden_judgements, self_judgements
    from embeddings_pipeline.search.judgements import read_judgements

    if by_itself:
        return self_judgements(definition, settings)
    judgements = read_judgements(queries, qrels) if queries else golden_judgements(definition)
    assert judgements is not None  # `evaluation:` is there
    return judgements


def _print(evaluation: "Evaluation", smoke_test: str | None) -> None:
    """A table of the ways; then what each is against the first."""
    from embeddings_pipeline.search.measures import DEPTH, WORDS

    print(
        printable(
            f"{counted(evaluation.queries, 'query')} from {evaluation.source}, "
            f"{counted(evaluation.relevant_items, 'relevant item')}; in brackets: intervals of 95 %; milliseconds of a "
            f"search for {DEPTH} items, the query's encoding included"
        )
    )
    if smoke_test:
        print(smoke_test)
    head = ["", *WORDS.values(), "p50 ms", "p95 ms"]
    rows = [
        [way.name, *(_figure(way.figures[name]) for name in WORDS), f"{way.p50_ms:.1f}", f"{way.p95_ms:.1f}"]
        for way in evaluation.ways
    ]
    _table([head, *rows])
    compared = [
        [way.name, *(_difference(way.against_first[name]) for name in WORDS)]
        for way in evaluation.ways
        if way.against_first
    ]
    if compared:
        print()
        print(printable(f"against {evaluation.ways[0].name}, query by query (p: how often chance does as much)"))
        _table([["", *WORDS.values()], *compared])


def _table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(printable("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()))


def _figure(figure: "Figure") -> str:
    return f"{figure.mean:.3f}" + ("" if figure.low is None else f" [{figure.low:.3f} {figure.high:.3f}]")


def _difference(difference: "Difference") -> str:
    if difference.low is None:
        return f"{difference.mean:+.3f}"
    chance = "p<0.001" if difference.p is not None and difference.p < LEAST_P else f"p={difference.p:.3f}"
    return f"{difference.mean:+.3f} [{difference.low:+.3f} {difference.high:+.3f}] {chance}"
