"""`search` and `similar`: the items that fit a text in meaning or words, and those nearest to an item."""

from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from embeddings_pipeline.cli.console import (
    CollectionOption,
    JsonOption,
    chosen_collection,
    json_of,
    print_cut,
    print_json,
    printable,
    start_database,
    waiting,
)
from embeddings_pipeline.cli.where import where_of_words
from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings, load_settings

if TYPE_CHECKING:
    from embeddings_pipeline.search.hits import Hit, Hits

WORDS = ("bm25", "tsvector")  # what answers by words

KOption = Annotated[int, typer.Option("-k", min=1, max=1000, help="How many items.")]
WhereOption = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="CONDITION",
        help="Only items that meet it: 'release_year>=2000', 'genres=Drama', 'genres=[\"Drama\", \"Crime\"]' (any of "
        "them), 'director=null', or a condition as JSON. Several: all of them.",
    ),
]
VectorOption = Annotated[
    list[str] | None, typer.Option("--vector", help="Which of the items' vectors, also several; left out: the first.")
]
FaissOption = Annotated[bool, typer.Option("--faiss", help="Ask the FAISS index instead of PostgreSQL.")]
ProfileOption = Annotated[
    str | None, typer.Option(help="Another model that `profile add` keeps; left out: the current one.")
]
ModeOption = Annotated[
    str | None,
    typer.Option(
        help="`dense`: by meaning; `text`: by words; `hybrid`: both, joined. Left out: hybrid if the collection has "
        "`words:`, else dense."
    ),
]
RerankOption = Annotated[
    bool | None,
    typer.Option(
        "--rerank/--no-rerank",
        help="Have a cross-encoder put the first hits into order, or not. Left out: as `ENABLE_RERANKER` says.",
    ),
]
ExplainOption = Annotated[
    bool, typer.Option("--explain", help="Say what was asked, what fell back and why, ranks, scores and times.")
]


def search(
    query: Annotated[str, typer.Argument(help="What to look for, in words.")],
    k: Annotated[
        int | None,
        typer.Option(
            "-k", min=1, max=1000, help="How many items. Left out: 10, or `RETURN_TOP_K` (20) if they are reranked."
        ),
    ] = None,
    collection_name: CollectionOption = None,
    where: WhereOption = None,
    vector: VectorOption = None,
    faiss: FaissOption = False,
    profile: ProfileOption = None,
    mode: ModeOption = None,
    rerank: RerankOption = None,
    explain: ExplainOption = False,
    as_json: JsonOption = False,
) -> None:
    """The best items for some words: by meaning, with their cosine; by the words themselves; or by both, joined."""
    settings = load_settings()
    definition = chosen_collection(collection_name)
    condition = where_of_words(definition, where or [])
    start_database(settings)
    from embeddings_pipeline.search.query import search as run_search

    with waiting("searching" if mode == "text" else "loading the model"):
        hits = run_search(
            *(definition, settings, query),
            k=k,
            where=condition,
            vectors=vector,
            index=_index(faiss),
            profile=profile,
            mode=mode,  # type: ignore[arg-type]
            rerank=rerank,
        )
    _print(hits, definition, settings, explain=explain, as_json=as_json)


def similar(
    item_key: Annotated[str, typer.Argument(help="The item's key, as `search` shows it.")],
    k: KOption = 10,
    collection_name: CollectionOption = None,
    where: WhereOption = None,
    vector: VectorOption = None,
    faiss: FaissOption = False,
    profile: ProfileOption = None,
    explain: ExplainOption = False,
    as_json: JsonOption = False,
) -> None:
    """The items nearest in meaning to an item, which is left out itself."""
    settings = load_settings()
    definition = chosen_collection(collection_name)
    condition = where_of_words(definition, where or [])
    start_database(settings)
    from embeddings_pipeline.search.query import similar as run_similar

    hits = run_similar(
        *(definition, settings, item_key), k=k, where=condition, vectors=vector, index=_index(faiss), profile=profile
    )
    _print(hits, definition, settings, explain=explain, as_json=as_json)


def recommend(
    liked: Annotated[
        list[str] | None, typer.Option("--liked", help="The key of an item that was liked; several.")
    ] = None,
    disliked: Annotated[
        list[str] | None, typer.Option("--disliked", help="The key of an item that was disliked; several.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="Whose history to read from `interactions:` of defs.yaml.")] = None,
    k: KOption = 10,
    collection_name: CollectionOption = None,
    where: WhereOption = None,
    vector: VectorOption = None,
    faiss: FaissOption = False,
    profile: ProfileOption = None,
    strategy: Annotated[
        str | None, typer.Option(help="`mean`: near the middle of what was liked; `best`: near any one of it.")
    ] = None,
    diversity: Annotated[
        float | None, typer.Option(help="From 0, the best whatever they have in common, to 1.")
    ] = None,
    half_life_days: Annotated[
        float | None, typer.Option("--half-life", metavar="DAYS", help="After so many days an interaction counts half.")
    ] = None,
    explain: ExplainOption = False,
    as_json: JsonOption = False,
) -> None:
    """Items for somebody: near what they liked, new to them, and not all alike. Without a history: what is popular."""
    settings = load_settings()
    definition = chosen_collection(collection_name)
    condition = where_of_words(definition, where or [])
    start_database(settings)
    from embeddings_pipeline.search.recommend import recommend as run_recommend

    hits = run_recommend(
        *(definition, settings),
        liked=liked or [],
        disliked=disliked or [],
        user=user,
        k=k,
        where=condition,
        vectors=vector,
        index=_index(faiss),
        profile=profile,
        strategy=strategy,  # type: ignore[arg-type]
        diversity=diversity,
        half_life_days=half_life_days,
    )
    _print(hits, definition, settings, explain=explain, as_json=as_json)


def _index(faiss: bool) -> Literal["faiss", "pgvector"]:
    return "faiss" if faiss else "pgvector"


def _print(hits: "Hits", definition: CollectionDefinition, settings: Settings, *, explain: bool, as_json: bool) -> None:
    if as_json:
        listed = [vars(hit) for hit in hits]
        print_json({"hits": listed, "explanation": hits.explanation.as_dict()} if explain else listed)
        return
    for hit in hits:
        print_hit(hit, definition.attributes.columns, digits=4 if hits.explanation.mode == "hybrid" else 3)
    if not hits and hits.explanation.mode == "text":
        print("nothing found: no text has a word of the query, or none whose item meets the condition")
    elif not hits and hits.explanation.expected_matches is not None:
        print("nothing found: no item that has a vector meets the condition")
    elif not hits:
        from embeddings_pipeline.search.query import nothing_found

        print(printable(nothing_found(definition, settings)))
    if explain:
        for line in explanation_lines(hits):
            print(printable(line))


def explanation_lines(hits: "Hits") -> list[str]:
    """What a search did, for people: of each leg, where it has the items that are shown."""
    explanation, found = hits.explanation, {hit.item_key for hit in hits}
    lines = ["", f"mode {explanation.mode}, model {explanation.profile} ({explanation.fingerprint})"]
    lines += [f"fell back: {why}" for why in explanation.fell_back]
    if explanation.expected_matches is not None:
        lines.append(f"filter: about {explanation.expected_matches} items are expected to meet it")
    for leg in explanation.legs:
        lines.append(
            f"{'words of' if leg.answered_by in WORDS else 'vector'} {leg.vector_name}: {leg.answered_by}, {leg.how}; "
            f"{leg.texts} texts of {len(leg.ranks)} items; {leg.milliseconds:.1f} ms"
            if leg.vector_name
            else f"{leg.answered_by}: {leg.how}; {len(leg.ranks)} items; {leg.milliseconds:.1f} ms"
        )
        lines += [f"  fell back: {why}" for why in leg.fell_back]
        lines += [f"  {rank}. {key}  {score:.4f}" for key, (rank, score) in leg.ranks.items() if key in found]
    if rerank := explanation.rerank:
        lines.append(
            f"rerank: {rerank.model}, {rerank.how}; {rerank.scored} of {rerank.candidates} hits scored; "
            f"{rerank.milliseconds:.1f} ms"
            if rerank.model
            else f"rerank: {rerank.how}"
        )
        lines += [f"  fell back: {why}" for why in rerank.fell_back]
        lines += [f"  was {rank}. {key}  {score:.4f}" for key, (rank, score) in rerank.ranks.items() if key in found]
    lines.append(", ".join(f"{name} {value:.1f} ms" for name, value in explanation.milliseconds.items()))
    return lines


def print_hit(hit: "Hit", columns: Sequence[str], *, digits: int = 3) -> None:
    """Score, key and first column of the payload, then the rest and the text that was near, cut to the terminal."""
    payload = [(column, hit.item.get(column)) for column in columns]
    shown = [_shown(*each) for each in payload if each[1] is not None]
    first, rest = shown[:1], [*shown[1:], printable(hit.text)]
    print_cut("  ".join([f"{hit.score:.{digits}f}", printable(hit.item_key), *first]), " · ".join(["", *rest]))


def _shown(column: str, value: object) -> str:
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):  # says nothing without its name
        return f"{column} {value}"
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return printable(", ".join(value))
    return printable(value if isinstance(value, str) else json_of(value))
