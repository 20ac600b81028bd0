"""`embeddings-pipeline profile …`: which models there are, and moving a collection from definition to another."""

import re
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
import yaml

from embeddings_pipeline.cli.console import print_json, progress_bar
from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.errors import ConfigurationError, ModelChangeError, ProfileError

if TYPE_CHECKING:
    from embeddings_pipeline.config.definition import CollectionDefinition
    from embeddings_pipeline.config.profiles import Profile
    from embeddings_pipeline.pipeline.collection import Collection

app = typer.Typer(
    help="Models: which there are, and moving a collection from definition to another while it is in use."
)

CollectionOption = Annotated[str | None, typer.Option("--collection", "-c", help="Left out: the only one, or `items`.")]
NameArgument = Annotated[str, typer.Argument(help="The profile's name: see `profile list`.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before it starts.")]
TEST_BATCHES = (1, 8, 32, 128)
TEST_TEXTS = 128
TEST_SENTENCE = "A retired detective returns to the village where his first case was never solved. "
BASELINE = "quality"  # what `profile test` compares with where it loads


@app.command("list")
def list_profiles(collection_name: CollectionOption = None, as_json: JsonOption = False) -> None:
    """The profiles that there are: built in, and the collection's own."""
    definition = _definition(collection_name)
    profiles = _known(definition)
    if as_json:
        print_json([asdict(profile) for profile in profiles])
        return
    for profile in profiles:
        print(f"{profile.name:<12} {profile.dimensions:>5} dimensions  {profile.provider:<7} {profile.model}")


@app.command()
def show(name: NameArgument, collection_name: CollectionOption = None, as_json: JsonOption = False) -> None:
    """All of a profile's settings, its fingerprint, and whether its weights are here."""
    from embeddings_pipeline.config.profiles import fingerprint

    profile = _profile(_definition(collection_name), name)
    try:
        digest, why = fingerprint(profile, load_settings().state_dir), None
    except ProfileError as error:
        digest, why = None, str(error)
    if as_json:
        print_json({**asdict(profile), "fingerprint": digest})
        return
    for key, value in asdict(profile).items():
        print(f"{key:<17} {'' if value is None else value}")
    print(f"{'fingerprint':<17} {digest or f'unknown: {why}'}")


@app.command()
def test(
    names: Annotated[list[str] | None, typer.Argument(help="Profiles; left out: the collection's.")] = None,
    collection_name: CollectionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Texts a second at several batch sizes, memory and device, beside `quality` where that can be loaded."""
    definition = _definition(collection_name)
    chosen = [_profile(definition, name) for name in names] if names else [_declared(definition)]
    if BASELINE not in {profile.name for profile in chosen}:
        chosen.append(_profile(definition, BASELINE))
    results = []
    for profile in chosen:
        try:
            results.append(_measured(profile))
        except ProfileError as error:
            if profile.name != BASELINE or profile is chosen[0]:
                raise
            results.append({"profile": profile.name, "error": str(error)})
    if as_json:
        print_json(results)
        return
    for found in results:
        if "error" in found:
            print(f"{found['profile']}: not compared with: {found['error']}")
            continue
        rates = ", ".join(f"{size}: {rate:,.0f}" for size, rate in found["texts_per_second"].items())
        print(f"{found['profile']}: {found['dimensions']} dimensions on {found['device']}, {found['memory_mb']:,} MB")
        print(f"  texts a second by batch size  {rates}")


def _measured(profile: "Profile") -> dict[str, Any]:
    import psutil

    from embeddings_pipeline.encoders import load_encoder

    before = psutil.Process().memory_info().rss
    rates: dict[str, float] = {}
    device = profile.device or "automatic"
    for size in TEST_BATCHES:
        encoder = load_encoder(replace(profile, batch_size=size))
        device = str(getattr(encoder, "device", device))
        texts = [f"{TEST_SENTENCE * (1 + n % 4)}{n}" for n in range(max(size, min(TEST_TEXTS, 8 * size)))]
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


@app.command()
def plan(name: NameArgument, collection_name: CollectionOption = None, as_json: JsonOption = False) -> None:
    """Every statement of a switch in order, with its lock, duration and disk. Nothing is done."""
    from embeddings_pipeline.model_change.plan import plan as plan_of

    definition = _definition(collection_name)
    collection = _open(definition)
    planned = plan_of(collection, _profile(definition, name))
    if as_json:
        print_json([asdict(step) for step in planned])
        return
    phase = ""
    for step in planned:
        if step.phase != phase:
            phase = step.phase
            print(f"-- {phase}")
        size = f", {_size(step.bytes)}" if step.bytes else ""
        print(f"{step.statement};")
        print(f"--   {step.lock}; about {_duration(step.seconds)}{size}")
    total = _size(sum(step.bytes for step in planned if step.bytes > 0))
    print(f"-- {total} of disk meanwhile. The encoding comes to that: `profile switch {name}` measures it, and asks.")


@app.command()
def switch(
    name: Annotated[
        str | None, typer.Argument(help="The profile's name; left out, a terminal offers the choice.")
    ] = None,
    collection_name: CollectionOption = None,
    yes: YesOption = False,
    write: Annotated[bool, typer.Option("--write", help="Change `profile:` in the collection's defs.yaml.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Move a collection to another model, while it is searched and written to. It can be undone: `profile rollback`."""
    from embeddings_pipeline.model_change.plan import price
    from embeddings_pipeline.model_change.state import candidate_profile, open_change
    from embeddings_pipeline.orchestration.switch import SwitchResult
    from embeddings_pipeline.orchestration.switch import switch as run_switch

    definition = _definition(collection_name)
    collection = _open(definition)
    name = name or _choice(definition, collection)
    profile = candidate_profile(collection, name)
    change = open_change(collection)
    new = None if change is None else change.shadow if change.phase == "expanded" else change.current
    if change is not None and new is not None and new.profile.name != profile.name:
        raise ModelChangeError(
            f"collection {definition.name!r}: a change to {new.profile.name} is open ({change.phase}); finish "
            f"or undo it first: `embeddings-pipeline profile status`"
        )
    if change is not None and change.phase == "swapped":
        if as_json:
            print_json(asdict(SwitchResult(definition.name, change.previous.profile.name, profile.name)))
        else:
            print(
                f"{definition.name}: {profile.name} is the current model already; see `embeddings-pipeline profile "
                "status`"
            )
        _declare(definition, name, write=write)
        return
    if not yes:
        found = price(collection, profile)
        print(
            f"{definition.name}: {collection.profile.name} → {profile.name}: {found.texts:,} texts, about "
            f"{found.tokens:,} tokens "
            f"and {_duration(found.seconds)} on this machine, {_size(found.bytes)} on the database's disk",
            file=sys.stderr,
        )
        if not sys.stdin.isatty():
            raise ConfigurationError("there is no terminal to ask on: give --yes to start")
        typer.confirm("Start?", abort=True, err=True)
    with progress_bar(definition.name, show=not as_json) as progress:
        done = run_switch(definition, load_settings(), name, progress_of=progress)
    if as_json:
        print_json(asdict(done))
    else:
        figures = f"recall@10 of its index {done.recall_at_10:.3f}" if done.recall_at_10 is not None else ""
        if done.ndcg_candidate is not None:
            figures += f", nDCG@10 {done.ndcg_current:.3f} → {done.ndcg_candidate:.3f}"
        elif done.neighbour_overlap is not None:
            figures += f", {done.neighbour_overlap:.0%} of the nearest ten as before"
        print(
            f"{definition.name}: {done.previous} → {done.profile}: {done.embedded:,} texts embedded, "
            f"{done.quarantined:,} in "
            f"quarantine; {figures}; locked for {done.locked_ms:.1f} ms; {done.seconds:.1f} s"
        )
        print(f"Undo: `embeddings-pipeline profile rollback`. Finish: `profile contract`, after {_grace(definition)}.")
    _declare(definition, name, write=write)


@app.command()
def status(collection_name: CollectionOption = None, as_json: JsonOption = False) -> None:
    """The current model, those kept current beside it, and the change that is under way."""
    from embeddings_pipeline.model_change.state import open_change, progress

    definition = _definition(collection_name)
    collection = _open(definition)
    change = open_change(collection)
    shadows = [(model, progress(collection, model)) for model in collection.ledger.shadow_models()]
    if as_json:
        print_json(
            {
                "collection": definition.name,
                "current": {"profile": collection.profile.name, "fingerprint": collection.fingerprint},
                "beside": [
                    {"profile": model.profile.name, "fingerprint": model.table.fingerprint, **vars(done)}
                    for model, done in shadows
                ],
                "migration": None
                if change is None
                else {
                    "phase": change.phase,
                    "current": change.current.profile.name,
                    "candidate": change.candidate.profile.name if change.phase == "expanded" else None,
                    "previous": change.previous.profile.name if change.phase == "swapped" else None,
                    "expanded_at": change.expanded_at,
                    "swapped_at": change.swapped_at,
                    "gate": change.gate,
                },
            }
        )
        return
    print(
        f"{definition.name}: {collection.profile.name} ({collection.fingerprint}), "
        f"{collection.current.table.dimension} dimensions, current"
    )
    for model, done in shadows:
        print(
            f"  beside it {model.profile.name} ({model.table.fingerprint}), {model.table.dimension} dimensions: "
            f"{done.backfilled:,} of {done.batches:,} batches backfilled"
        )
    if change is None:
        print("  no change of the model is under way")
    elif change.phase == "expanded":
        print(
            f"  a change to {change.candidate.profile.name} began {change.expanded_at:%Y-%m-%d %H:%M %Z}; go on with "
            f"`profile switch {change.candidate.profile.name}`, undo it with `profile rollback`"
        )
    elif change.swapped_at is not None:
        ends = change.swapped_at + timedelta(hours=definition.attributes.model_change.grace_hours)
        print(
            f"  changed from {change.previous.profile.name} {change.swapped_at:%Y-%m-%d %H:%M %Z}; `profile "
            f"rollback` undoes it at once; `profile contract` drops {change.previous.profile.name}, from "
            f"{ends:%Y-%m-%d %H:%M %Z} on"
        )


@app.command()
def rollback(collection_name: CollectionOption = None, yes: YesOption = False) -> None:
    """Bring the previous model back at once; before the swap, drop the candidate instead."""
    from embeddings_pipeline.model_change.phases import roll_back
    from embeddings_pipeline.model_change.state import open_change

    definition = _definition(collection_name)
    collection = _open(definition)
    change = open_change(collection)
    if change is not None and change.phase == "expanded" and not yes:
        if not sys.stdin.isatty():
            raise ConfigurationError("nothing has been swapped: --yes drops what was embedded for the candidate")
        typer.confirm(f"Drop what was embedded for {change.candidate.profile.name}?", abort=True, err=True)
    done = roll_back(collection, "rollback")
    if done is None:
        print(f"{definition.name}: the change was ended; {collection.profile.name} serves as before")
        return
    back = _open(definition)
    print(
        f"{definition.name}: {back.profile.name} is the current model again, locked for "
        f"{done.exclusive.locked_ms:.1f} ms; "
        f"{collection.profile.name} is kept current: `profile switch` brings it back, `profile rollback` once more "
        "drops it"
    )
    _declare(definition, back.profile.name, write=False)


@app.command()
def contract(
    collection_name: CollectionOption = None,
    now: Annotated[bool, typer.Option("--now", help="Within the grace period too.")] = False,
) -> None:
    """Drop the previous model. After it there is no way back."""
    from embeddings_pipeline.model_change.phases import contract as run_contract
    from embeddings_pipeline.model_change.state import open_change

    definition = _definition(collection_name)
    collection = _open(definition)
    change = open_change(collection)
    done = run_contract(collection, now=now)
    previous = change.previous.profile.name if change else "the previous model"
    print(f"{definition.name}: {previous} was dropped in {done.transaction_ms:.0f} ms; {collection.profile.name} stays")


@app.command()
def add(name: NameArgument, collection_name: CollectionOption = None) -> None:
    """Keep a second model current beside the current one, for `search --profile NAME`."""
    from embeddings_pipeline.model_change.phases import add_model
    from embeddings_pipeline.model_change.state import candidate_profile

    definition = _definition(collection_name)
    collection = _open(definition)
    model = add_model(collection, candidate_profile(collection, name))
    print(
        f"{definition.name}: {name} ({model.table.fingerprint}) is kept beside {collection.profile.name}; the next "
        f"`embeddings-pipeline sync` backfills it"
    )


@app.command()
def remove(name: NameArgument, collection_name: CollectionOption = None) -> None:
    """Drop a model that `profile add` keeps."""
    from embeddings_pipeline.model_change.phases import remove_model

    definition = _definition(collection_name)
    model = remove_model(_open(definition), name)
    print(f"{definition.name}: {model.profile.name} ({model.table.fingerprint}) was dropped")


# --- what they share ---------------------------------------------------------------------------------------------


def _definition(name: str | None) -> "CollectionDefinition":
    from embeddings_pipeline.config.definition import find_collection, load_collections

    return find_collection(load_collections(load_settings().defs_dir), name)


def _open(definition: "CollectionDefinition") -> "Collection":
    from embeddings_pipeline.pipeline.collection import open_collection

    return open_collection(definition, load_settings())


def _profile(definition: "CollectionDefinition", name: str) -> "Profile":
    from embeddings_pipeline.config.profiles import resolve_profile

    return resolve_profile(definition.profile_named(name), load_settings())


def _declared(definition: "CollectionDefinition") -> "Profile":
    from embeddings_pipeline.config.profiles import resolve_profile

    return resolve_profile(definition.declared_profile, load_settings())


def _known(definition: "CollectionDefinition") -> "list[Profile]":
    from embeddings_pipeline.config.profiles import BUILT_IN

    declared = _declared(definition)
    names = dict.fromkeys([*BUILT_IN, *definition.attributes.profiles])
    known = [_profile(definition, name) for name in names]
    return known if declared.name in names else [declared, *known]


def _choice(definition: "CollectionDefinition", collection: "Collection") -> str:
    if not sys.stdin.isatty():
        raise ConfigurationError("name the profile to switch to: see `embeddings-pipeline profile list`")
    others = [profile for profile in _known(definition) if profile.name != collection.profile.name]
    print(
        f"{definition.name} is on {collection.profile.name} ({collection.profile.dimensions} dimensions).",
        file=sys.stderr,
    )
    for number, profile in enumerate(others, 1):
        print(f"  {number}  {profile.name} ({profile.dimensions} dimensions, {profile.model})", file=sys.stderr)
    chosen = typer.prompt("Switch to which", type=click.Choice([str(n) for n in range(1, len(others) + 1)]), err=True)
    return others[int(chosen) - 1].name


def _declare(definition: "CollectionDefinition", name: str, *, write: bool) -> None:
    """Say, or make, the change in defs.yaml, without which each command warns."""
    destination = definition.attributes.destination
    declared, key = (
        (destination.profile, "destination.profile") if destination else (definition.attributes.profile, "profile")
    )
    if declared == name or definition.path is None:
        return
    if write:
        _write_profile(definition.path, name, in_destination=destination is not None)
        print(f"{definition.path}: {key}: {name}", file=sys.stderr)
    elif declared is None:
        print(f"Set EMBEDDING_PROFILE={name}, or `profile: {name}` in {definition.path}.", file=sys.stderr)
    else:
        print(f"Set `{key}: {name}` in {definition.path} (--write does it).", file=sys.stderr)


def _write_profile(path: Path, name: str, *, in_destination: bool = False) -> None:
    """Set `profile:` of the attributes, or of `destination:`, and leave the rest. ConfigurationError where that
    fails.
    """
    by_hand = ConfigurationError(f"{path}: set `profile: {name}` there by hand; the rest of the switch is done")
    with path.open(encoding="utf-8", newline="") as file:  # line ends as they are
        text = file.read()
    try:
        wanted = yaml.safe_load(text)
    except yaml.YAMLError:
        raise by_hand from None
    (wanted["attributes"]["destination"] if in_destination else wanted["attributes"])["profile"] = name
    line = re.compile(r"^(?P<before> +)profile:[ \t]*[\w./-]+(?P<rest>[ \t]*(#[^\r\n]*)?)(?=\r?$)", re.MULTILINE)
    if in_destination and not line.search(text):
        line = re.compile(
            r"(?P<before>^ +destination:[^\r\n]*[{,][ \t]*)profile:[ \t]*[\w./-]+(?P<rest>)", re.MULTILINE
        )
    if line.search(text):
        changed = line.sub(lambda found: f"{found['before']}profile: {name}{found['rest']}", text, count=1)
    else:
        after_name = re.compile(r"^( +)name:[^\r\n]*(\r?\n)", re.MULTILINE)
        changed = after_name.sub(rf"\g<0>\g<1>profile: {name}\g<2>", text, count=1)
    try:
        right = yaml.safe_load(changed) == wanted
    except yaml.YAMLError:
        right = False
    if not right:
        raise by_hand
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(changed)


def _grace(definition: "CollectionDefinition") -> str:
    return f"{definition.attributes.model_change.grace_hours:g} hours"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _size(count: int) -> str:
    sign, count = ("-" if count < 0 else ""), abs(count)
    return f"{sign}{count / 1e9:.1f} GB" if count >= 1e9 else f"{sign}{count / 1e6:.1f} MB"
