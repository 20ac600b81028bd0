"""`cache …`: the embedding cache, which keeps what models have answered."""

from dataclasses import asdict
from typing import Annotated

import typer

from embeddings_pipeline.cli.console import (
    JsonOption,
    YesOption,
    confirm,
    database_to_read,
    pipeline_database,
    print_json,
    size,
)
from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.errors import ConfigurationError

app = typer.Typer(
    help="The embedding cache: what models have answered, so that nothing is paid for twice.",
    no_args_is_help=True,
    suggest_commands=False,
)

FingerprintsArgument = Annotated[
    list[str] | None, typer.Argument(help="Fingerprints, as `cache statistics` shows them.")
]
AllOption = Annotated[bool, typer.Option("--all", help="Everything that is kept.")]


@app.command("statistics")
def cache_statistics(as_json: JsonOption = False) -> None:
    """How many answers are kept of each model, their size and age, and which collections use it."""
    from embeddings_pipeline.encoders.cache import model_users, open_cache

    settings = load_settings()
    database = database_to_read(settings)
    kept = open_cache(database, settings).statistics()
    users = model_users(database)
    if as_json:
        print_json([{**asdict(each), "used_by": users.get(each.fingerprint, [])} for each in kept])
        return
    where = "Redis" if settings.embedding_cache_url else "PostgreSQL"
    days = f"{settings.cache_days} days" if settings.cache_days else "for ever"
    print(f"in {where}, kept {days}: {sum(each.answers for each in kept):,} answers")
    for each in kept:
        written = f", {each.first_at:%Y-%m-%d} to {each.last_at:%Y-%m-%d}" if each.first_at and each.last_at else ""
        used = ", ".join(users.get(each.fingerprint, ())) or "no collection"
        print(f"{each.fingerprint}  {each.answers:,} answers, {size(each.bytes)}{written}; used by {used}")


@app.command("sweep")
def cache_sweep(as_json: JsonOption = False) -> None:
    """Forget what is older than EMBEDDING_CACHE_DAYS (30). It is done every day; Redis does so itself."""
    from embeddings_pipeline.encoders.cache import sweep

    settings = load_settings()
    swept = sweep(pipeline_database(settings), settings)
    if as_json:
        print_json({"answers": swept})
        return
    print(f"{swept:,} answers older than {settings.cache_days} days are gone")


@app.command("purge")
def cache_purge(
    fingerprints: FingerprintsArgument = None,
    every: AllOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Forget what models have answered. Vectors that are stored stay; what is asked again is paid for again."""
    from embeddings_pipeline.encoders.cache import open_cache

    if bool(fingerprints) == every:
        raise ConfigurationError("name fingerprints as `cache statistics` shows them, or give --all")
    settings = load_settings()
    cache = open_cache(pipeline_database(settings), settings)
    known = {each.fingerprint: each.answers for each in cache.statistics()}
    if unknown := [name for name in fingerprints or () if name not in known]:
        raise ConfigurationError(f"the cache keeps nothing of {', '.join(unknown)}; see `cache statistics`")
    answers = sum(known[name] for name in fingerprints or known)
    if not yes:
        confirm(f"Forget {answers:,} answers?", "there is no terminal to ask on: give --yes to forget them")
    purged = cache.purge(fingerprints)
    if as_json:
        print_json({"answers": purged})
        return
    print(f"{purged:,} answers are forgotten")
