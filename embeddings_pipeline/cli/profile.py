"""`profile …`: which models there are, and which a collection keeps. Changing it: profile_change.py."""

import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embeddings_pipeline.cli import profile_change
from embeddings_pipeline.cli.console import (
    CollectionOption,
    JsonOption,
    chosen_collection,
    database_to_read,
    print_json,
    tell,
)
from embeddings_pipeline.cli.profile_choice import (
    NameArgument,
    declared_profile,
    known_profiles,
    open_chosen,
    profile_named,
)
from embeddings_pipeline.cli.profile_words import described, description_lines
from embeddings_pipeline.config.settings import Settings, load_settings
from embeddings_pipeline.errors import DatabaseError, ProfileError

if TYPE_CHECKING:
    from embeddings_pipeline.config.definition import CollectionDefinition
    from embeddings_pipeline.config.profiles import Profile
    from embeddings_pipeline.encoders.base import Encoder

app = typer.Typer(
    help="Models: which there are, and moving a collection from one to another while it is in use.",
    no_args_is_help=True,
    suggest_commands=False,
)
TEST_BATCHES = (1, 8, 32, 128)
TEST_TEXTS = 128
TEST_SENTENCE = "A retired detective returns to the village where his first case was never solved. "
BASELINE = "quality"  # what `profile test` compares with, if it can be loaded


@app.command("list")
def list_profiles(collection_name: CollectionOption = None, as_json: JsonOption = False) -> None:
    """The profiles that there are: built in, and the collection's own; which are declared, current, beside it."""
    definition = chosen_collection(collection_name)
    profiles = {profile.name: profile for profile in known_profiles(definition)}
    active = _active_models(definition)
    profiles |= {name: profile for name, (_, profile) in active.items() if name not in profiles}
    marks = {name: [mark] for name, (mark, _) in active.items()}
    marks.setdefault(declared_profile(definition).name, []).append("declared")
    if as_json:
        print_json([{**_as_dict(each), "marks": marks.get(each.name, [])} for each in profiles.values()])
        return
    for each in profiles.values():
        marked = f"  ({', '.join(marks[each.name])})" if each.name in marks else ""
        star = "*" if each.name in active else " "
        print(f"{star} {each.name:<12} {each.dimensions:>5} dimensions  {each.provider:<7} {each.model}{marked}")


def _active_models(definition: "CollectionDefinition") -> "dict[str, tuple[str, Profile]]":
    """The models that the collection has vectors of: profile's name → current or beside, and the profile."""
    from embeddings_pipeline.ledger.ledger import Ledger

    try:
        ledger = Ledger(definition, database_to_read(load_settings()))
        current = ledger.current()
        if current is None or not ledger.has_vectors():
            return {}
        models = [("beside it", model.profile) for model in ledger.shadow_models()]
        return {profile.name: (mark, profile) for mark, profile in (*models, ("current", current.profile))}
    except DatabaseError as error:
        tell(f"which are current is not known: {error}")
        return {}


@app.command()
def show(name: NameArgument, collection_name: CollectionOption = None, as_json: JsonOption = False) -> None:
    """All of a profile's settings with its model's own prompts, its fingerprint, and whether the weights of a local
    model are here. They are downloaded first if they are not, since the fingerprint is made of them.
    """
    from embeddings_pipeline.config.fingerprint import fingerprint
    from embeddings_pipeline.config.model_words import with_model_prompts
    from embeddings_pipeline.config.weights import weights_here

    profile = profile_named(chosen_collection(collection_name), name)
    try:
        digest, why = fingerprint(profile, load_settings().state_dir), None
        profile = with_model_prompts(profile)
    except ProfileError as error:
        digest, why = None, str(error)
    here = weights_here(profile) is not None if profile.provider == "local" else None
    if as_json:
        print_json({**_as_dict(profile), "fingerprint": digest, "weights_here": here})
        return
    for key, value in _as_dict(profile).items():
        print(f"{key:<17} {'' if value is None else value}")
    print(f"{'fingerprint':<17} {digest or f'unknown: {why}'}")
    if here is not None:
        print(f"{'weights here':<17} {'yes' if here else 'no'}")


@app.command()
def test(
    names: Annotated[list[str] | None, typer.Argument(help="Profiles; left out: the collection's.")] = None,
    collection_name: CollectionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Texts a second at several batch sizes, memory and device, beside `quality` if that is on this machine; and how a
    local model is used: prompts, tokens read, measure, pooling, and the lowest cosine to sentence-transformers' own
    vectors. What the texts cost of a model that takes money is said before they are sent.
    """
    from embeddings_pipeline.config.weights import weights_here

    definition = chosen_collection(collection_name)
    chosen = [profile_named(definition, name) for name in names] if names else [declared_profile(definition)]
    baseline = profile_named(definition, BASELINE)
    if BASELINE not in {profile.name for profile in chosen} and weights_here(baseline):
        chosen.append(baseline)
    settings = load_settings()
    results = [{**_measured(profile, settings), **described(profile, settings)} for profile in chosen]
    if as_json:
        print_json(results)
        return
    for result in results:
        rates = ", ".join(f"{size}: {rate:,.0f}" for size, rate in result["texts_per_second"].items())
        print(
            f"{result['profile']}: {result['dimensions']} dimensions on {result['device']}, {result['memory_mb']:,} MB"
        )
        print(f"  texts a second by batch size  {rates}")
        for line in description_lines(result):
            print(f"  {line}")
    if unlike := [result["profile"] for result in results if result.get("as_sentence_transformers") is False]:
        raise ProfileError(
            f"the vectors of {', '.join(unlike)} are not those of sentence-transformers' encode_document and "
            "encode_query (see the cosines): do not use it, and report it"
        )


def _measured(profile: "Profile", settings: Settings) -> dict[str, Any]:
    import psutil

    from embeddings_pipeline.config.prices import is_paid
    from embeddings_pipeline.encoders import load_encoder

    if is_paid(profile) and settings.embedding_enabled is not False:
        _tell_price(profile, settings)
    before = psutil.Process().memory_info().rss
    rates: dict[str, float] = {}
    device = profile.device or "automatic"
    for size in TEST_BATCHES:
        encoder = load_encoder(replace(profile, batch_size=size), settings)
        device = f"{getattr(encoder, 'device', device)}{_runtime(encoder)}"
        texts = _test_texts(size)
        encoder.encode_documents(texts[:1])
        began = time.perf_counter()
        encoder.encode_documents(texts)
        rates[str(size)] = round(len(texts) / (time.perf_counter() - began), 1)
    memory = (psutil.Process().memory_info().rss - before) // 1_000_000
    return {
        "profile": profile.name,
        "dimensions": profile.dimensions,
        "device": device,
        "memory_mb": memory,
        "texts_per_second": rates,
    }


def _test_texts(size: int) -> list[str]:
    return [f"{TEST_SENTENCE * (1 + n % 4)}{n}" for n in range(max(size, min(TEST_TEXTS, 8 * size)))]


def _tell_price(profile: "Profile", settings: Settings) -> None:
    """Say what `_measured` asks, and what that costs."""
    from embeddings_pipeline.config.prices import price_in_words, usd_per_million_tokens
    from embeddings_pipeline.encoders import load_encoder

    texts = [text for size in TEST_BATCHES for text in (*_test_texts(size)[:1], *_test_texts(size))]
    tokens = int(load_encoder(profile, settings).count_tokens(texts).sum())
    price = usd_per_million_tokens(profile)
    cost = "" if price is None else f", about ${price * tokens / 1e6:,.4f}"
    tell(f"{profile.name}: {len(texts)} texts are sent, about {tokens:,} tokens{cost}; {price_in_words(profile)}")


def _runtime(encoder: "Encoder") -> str:
    precision = getattr(encoder, "precision", None)
    return f" (OpenVINO, {precision})" if precision else ""


for command in (
    profile_change.plan,
    profile_change.switch,
    profile_change.status,
    profile_change.rollback,
    profile_change.contract,
):
    app.command()(command)


@app.command()
def add(name: NameArgument, collection_name: CollectionOption = None, as_json: JsonOption = False) -> None:
    """Keep a shadow model: a second one that is kept current, for `search --profile NAME`."""
    from embeddings_pipeline.model_change.phases import add_model
    from embeddings_pipeline.model_change.state import candidate_profile

    definition = chosen_collection(collection_name)
    collection = open_chosen(definition)
    model = add_model(collection, candidate_profile(collection, name))
    if as_json:
        print_json({"collection": definition.name, "profile": name, "fingerprint": model.destination.fingerprint})
        return
    print(
        f"{definition.name}: {name} ({model.destination.fingerprint}) is kept beside {collection.profile.name}; the "
        "next "
        f"`embeddings-pipeline sync` backfills it"
    )


@app.command()
def rebind(
    name: NameArgument,
    collection_name: CollectionOption = None,
    least_cosine: Annotated[
        float, typer.Option("--least-cosine", help="What each of twenty texts must reach.", min=0.0, max=1.0)
    ] = 0.999,
    as_json: JsonOption = False,
) -> None:
    """Let a profile make the current model's vectors: the same model at another place. Nothing is embedded anew; a
    profile that gives other vectors is refused.
    """
    from embeddings_pipeline.model_change.rebind import rebind as bind
    from embeddings_pipeline.model_change.state import candidate_profile

    definition = chosen_collection(collection_name)
    collection = open_chosen(definition)
    drift = bind(collection, candidate_profile(collection, name), least_cosine)
    if as_json:
        fingerprint = collection.fingerprint
        print_json({"collection": definition.name, "profile": name, "fingerprint": fingerprint, **asdict(drift)})
        return
    key = "profile" if definition.attributes.destination is None else "destination.profile"
    print(
        f"{definition.name}: {name} gives the vectors of {collection.profile.name} (lowest cosine of {drift.texts} "
        f"texts: {drift.lowest_cosine}) and may make them from now on: declare it (`{key}: {name}`)"
    )


@app.command()
def remove(name: NameArgument, collection_name: CollectionOption = None, as_json: JsonOption = False) -> None:
    """Drop a model that `profile add` keeps."""
    from embeddings_pipeline.model_change.phases import remove_model

    definition = chosen_collection(collection_name)
    model = remove_model(open_chosen(definition), name)
    if as_json:
        print_json({"collection": definition.name, "profile": name, "fingerprint": model.destination.fingerprint})
        return
    print(f"{definition.name}: {model.profile.name} ({model.destination.fingerprint}) was dropped")


def _as_dict(profile: "Profile") -> dict[str, Any]:
    return {"name": profile.name, **asdict(profile)}
