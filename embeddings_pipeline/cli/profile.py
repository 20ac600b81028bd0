"""`embeddings-pipeline profile …`: which models there are, and moving a collection from one to another."""

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
from embeddings_pipeline.errors import ConfigurationError, MigrationError, ProfileError

if TYPE_CHECKING:
    from embeddings_pipeline.config.definition import Collection
    from embeddings_pipeline.config.profiles import Profile
    from embeddings_pipeline.pipeline.collection import OpenCollection

app = typer.Typer(help="Models: which there are, and moving a collection from one to another while it is in use.")

CollectionOption = Annotated[str | None, typer.Option("--collection", "-c", help="Left out: the only one, or `items`.")]
NameArgument = Annotated[str, typer.Argument(help="The profile's name: see `profile list`.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before it starts.")]
TEST_BATCHES = (1, 8, 32, 128)
TEST_TEXTS = 128
TEST_SENTENCE = "A retired detective returns to the village where his first case was never solved. "
BASELINE = "quality"  # what `profile test` compares with where it loads


@app.command("list")
def list_profiles(collection: CollectionOption = None, as_json: JsonOption = False) -> None:
    """The profiles that there are: built in, and the collection's own."""
    one = _collection(collection)
    profiles = _known(one)
    if as_json:
        print_json([asdict(profile) for profile in profiles])
        return
    for profile in profiles:
        print(f"{profile.name:<12} {profile.dimensions:>5} dimensions  {profile.provider:<7} {profile.model}")


@app.command()
def show(name: NameArgument, collection: CollectionOption = None, as_json: JsonOption = False) -> None:
    """All of a profile's settings, its fingerprint, and whether its weights are here."""
    from embeddings_pipeline.config.profiles import fingerprint

    profile = _profile(_collection(collection), name)
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
    collection: CollectionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Texts a second at several batch sizes, memory and device, beside `quality` where that can be loaded."""
    one = _collection(collection)
    chosen = [_profile(one, name) for name in names] if names else [_declared(one)]
    if BASELINE not in {profile.name for profile in chosen}:
        chosen.append(_profile(one, BASELINE))
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
def plan(name: NameArgument, collection: CollectionOption = None, as_json: JsonOption = False) -> None:
    """Every statement of a switch in order, with its lock, duration and disk. Nothing is done."""
    from embeddings_pipeline.model_change.plan import plan as plan_of

    one = _collection(collection)
    opened = _opened(one)
    planned = plan_of(opened, _profile(one, name))
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
    collection: CollectionOption = None,
    yes: YesOption = False,
    write: Annotated[bool, typer.Option("--write", help="Change `profile:` in the collection's defs.yaml.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Move a collection to another model, while it is searched and written to. It can be undone: `profile rollback`."""
    from embeddings_pipeline.model_change.phases import open_migration, target_profile
    from embeddings_pipeline.model_change.plan import price
    from embeddings_pipeline.orchestration.switch import SwitchResult
    from embeddings_pipeline.orchestration.switch import switch as run_switch

    one = _collection(collection)
    opened = _opened(one)
    name = name or _choice(one, opened)
    profile = target_profile(opened, name)
    migration = open_migration(opened)
    if migration is not None and migration.next.profile.name != profile.name:
        raise MigrationError(
            f"collection {one.name!r}: a change to {migration.next.profile.name} is open ({migration.phase}); finish "
            f"or undo it first: `embeddings-pipeline profile status`"
        )
    if migration is not None and migration.phase == "swapped":
        if as_json:
            print_json(asdict(SwitchResult(one.name, migration.former.profile.name, profile.name)))
        else:
            print(f"{one.name}: {profile.name} is the active model already; see `embeddings-pipeline profile status`")
        _declare(one, name, write=write)
        return
    if not yes:
        found = price(opened, profile)
        print(
            f"{one.name}: {opened.profile.name} → {profile.name}: {found.texts:,} texts, about {found.tokens:,} tokens "
            f"and {_duration(found.seconds)} on this machine, {_size(found.bytes)} on the database's disk",
            file=sys.stderr,
        )
        if not sys.stdin.isatty():
            raise ConfigurationError("there is no terminal to ask on: give --yes to start")
        typer.confirm("Start?", abort=True, err=True)
    with progress_bar(one.name, show=not as_json) as progress:
        done = run_switch(one, load_settings(), name, progress_of=progress)
    if as_json:
        print_json(asdict(done))
    else:
        figures = f"recall@10 of its index {done.recall_at_10:.3f}" if done.recall_at_10 is not None else ""
        if done.ndcg_next is not None:
            figures += f", nDCG@10 {done.ndcg_former:.3f} → {done.ndcg_next:.3f}"
        elif done.neighbour_overlap is not None:
            figures += f", {done.neighbour_overlap:.0%} of the nearest ten as before"
        print(
            f"{one.name}: {done.former} → {done.profile}: {done.embedded:,} texts embedded, {done.quarantined:,} in "
            f"quarantine; {figures}; locked for {done.locked_ms:.1f} ms; {done.seconds:.1f} s"
        )
        print(f"Undo: `embeddings-pipeline profile rollback`. Finish: `profile contract`, after {_grace(one)}.")
    _declare(one, name, write=write)


@app.command()
def status(collection: CollectionOption = None, as_json: JsonOption = False) -> None:
    """The active model, those kept current beside it, and the change that is under way."""
    from embeddings_pipeline.model_change.phases import open_migration, progress

    one = _collection(collection)
    opened = _opened(one)
    migration = open_migration(opened)
    beside = [(model, progress(opened, model)) for model in opened.ledger.beside()]
    if as_json:
        print_json(
            {
                "collection": one.name,
                "active": {"profile": opened.profile.name, "fingerprint": opened.fingerprint},
                "beside": [
                    {"profile": model.profile.name, "fingerprint": model.table.fingerprint, **vars(done)}
                    for model, done in beside
                ],
                "migration": None
                if migration is None
                else {
                    "phase": migration.phase,
                    "former": migration.former.profile.name,
                    "next": migration.next.profile.name,
                    "expanded_at": migration.expanded_at,
                    "swapped_at": migration.swapped_at,
                    "gate": migration.gate,
                },
            }
        )
        return
    print(
        f"{one.name}: {opened.profile.name} ({opened.fingerprint}), {opened.active.table.dimension} dimensions, active"
    )
    for model, done in beside:
        print(
            f"  beside it {model.profile.name} ({model.table.fingerprint}), {model.table.dimension} dimensions: "
            f"{done.filled:,} of {done.batches:,} batches filled"
        )
    if migration is None:
        print("  no change of the model is under way")
    elif migration.phase == "expanded":
        print(
            f"  a change to {migration.next.profile.name} began {migration.expanded_at:%Y-%m-%d %H:%M %Z}; go on with "
            f"`profile switch {migration.next.profile.name}`, undo it with `profile rollback`"
        )
    elif migration.swapped_at is not None:
        ends = migration.swapped_at + timedelta(hours=one.config.migration.grace_hours)
        print(
            f"  changed from {migration.former.profile.name} {migration.swapped_at:%Y-%m-%d %H:%M %Z}; `profile "
            f"rollback` undoes it at once; `profile contract` drops {migration.former.profile.name}, from "
            f"{ends:%Y-%m-%d %H:%M %Z} on"
        )


@app.command()
def rollback(collection: CollectionOption = None, yes: YesOption = False) -> None:
    """Bring the former model back at once; before the swap, drop the next one instead."""
    from embeddings_pipeline.model_change.phases import open_migration, roll_back

    one = _collection(collection)
    opened = _opened(one)
    migration = open_migration(opened)
    if migration is not None and migration.phase == "expanded" and not yes:
        if not sys.stdin.isatty():
            raise ConfigurationError("nothing has been swapped: --yes drops what was embedded for the next model")
        typer.confirm(f"Drop what was embedded for {migration.next.profile.name}?", abort=True, err=True)
    done = roll_back(opened, "rollback")
    if done is None:
        print(f"{one.name}: the change was ended; {opened.profile.name} serves as before")
        return
    back = _opened(one)
    print(
        f"{one.name}: {back.profile.name} is the active model again, locked for {done.exclusive.locked_ms:.1f} ms; "
        f"{opened.profile.name} is kept current: `profile switch` brings it back, `profile rollback` once more drops it"
    )
    _declare(one, back.profile.name, write=False)


@app.command()
def contract(
    collection: CollectionOption = None,
    now: Annotated[bool, typer.Option("--now", help="Within the grace period too.")] = False,
) -> None:
    """Drop the former model. After it there is no way back."""
    from embeddings_pipeline.model_change.phases import contract as run_contract
    from embeddings_pipeline.model_change.phases import open_migration

    one = _collection(collection)
    opened = _opened(one)
    migration = open_migration(opened)
    done = run_contract(opened, now=now)
    former = migration.former.profile.name if migration else "the former model"
    print(f"{one.name}: {former} was dropped in {done.transaction_ms:.0f} ms; {opened.profile.name} stays")


@app.command()
def add(name: NameArgument, collection: CollectionOption = None) -> None:
    """Keep a second model current beside the active one, for `search --profile NAME`."""
    from embeddings_pipeline.model_change.phases import add_model, target_profile

    one = _collection(collection)
    opened = _opened(one)
    model = add_model(opened, target_profile(opened, name))
    print(
        f"{one.name}: {name} ({model.table.fingerprint}) is kept beside {opened.profile.name}; the next "
        f"`embeddings-pipeline sync` fills it"
    )


@app.command()
def remove(name: NameArgument, collection: CollectionOption = None) -> None:
    """Drop a model that `profile add` keeps."""
    from embeddings_pipeline.model_change.phases import remove_model

    one = _collection(collection)
    model = remove_model(_opened(one), name)
    print(f"{one.name}: {model.profile.name} ({model.table.fingerprint}) was dropped")


# --- what they share ---------------------------------------------------------------------------------------------


def _collection(name: str | None) -> "Collection":
    from embeddings_pipeline.config.definition import find_collection, load_collections

    return find_collection(load_collections(load_settings().defs_dir), name)


def _opened(collection: "Collection") -> "OpenCollection":
    from embeddings_pipeline.pipeline.collection import open_collection

    return open_collection(collection, load_settings())


def _profile(collection: "Collection", name: str) -> "Profile":
    from embeddings_pipeline.config.profiles import resolve_profile

    return resolve_profile(collection.profile_named(name), load_settings())


def _declared(collection: "Collection") -> "Profile":
    from embeddings_pipeline.config.profiles import resolve_profile

    return resolve_profile(collection.declared_profile, load_settings())


def _known(collection: "Collection") -> "list[Profile]":
    from embeddings_pipeline.config.profiles import BUILT_IN

    declared = _declared(collection)
    names = dict.fromkeys([*BUILT_IN, *collection.config.profiles])
    known = [_profile(collection, name) for name in names]
    return known if declared.name in names else [declared, *known]


def _choice(collection: "Collection", opened: "OpenCollection") -> str:
    if not sys.stdin.isatty():
        raise ConfigurationError("name the profile to switch to: see `embeddings-pipeline profile list`")
    others = [profile for profile in _known(collection) if profile.name != opened.profile.name]
    print(f"{collection.name} is on {opened.profile.name} ({opened.profile.dimensions} dimensions).", file=sys.stderr)
    for number, profile in enumerate(others, 1):
        print(f"  {number}  {profile.name} ({profile.dimensions} dimensions, {profile.model})", file=sys.stderr)
    chosen = typer.prompt("Switch to which", type=click.Choice([str(n) for n in range(1, len(others) + 1)]), err=True)
    return others[int(chosen) - 1].name


def _declare(collection: "Collection", name: str, *, write: bool) -> None:
    """Say, or make, the change in defs.yaml, without which each command warns."""
    target = collection.config.target
    declared, key = (target.profile, "target.profile") if target else (collection.config.profile, "profile")
    if declared == name or collection.path is None:
        return
    if write:
        _write_profile(collection.path, name, in_target=target is not None)
        print(f"{collection.path}: {key}: {name}", file=sys.stderr)
    elif declared is None:
        print(f"Set EMBEDDING_PROFILE={name}, or `profile: {name}` in {collection.path}.", file=sys.stderr)
    else:
        print(f"Set `{key}: {name}` in {collection.path} (--write does it).", file=sys.stderr)


def _write_profile(path: Path, name: str, *, in_target: bool = False) -> None:
    """Set `profile:` of the attributes, or of `target:`, and leave the rest. ConfigurationError where that fails."""
    by_hand = ConfigurationError(f"{path}: set `profile: {name}` there by hand; the rest of the switch is done")
    with path.open(encoding="utf-8", newline="") as file:  # line ends as they are
        text = file.read()
    try:
        wanted = yaml.safe_load(text)
    except yaml.YAMLError:
        raise by_hand from None
    (wanted["attributes"]["target"] if in_target else wanted["attributes"])["profile"] = name
    line = re.compile(r"^(?P<before> +)profile:[ \t]*[\w./-]+(?P<rest>[ \t]*(#[^\r\n]*)?)(?=\r?$)", re.MULTILINE)
    if in_target and not line.search(text):
        line = re.compile(r"(?P<before>^ +target:[^\r\n]*[{,][ \t]*)profile:[ \t]*[\w./-]+(?P<rest>)", re.MULTILINE)
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


def _grace(collection: "Collection") -> str:
    return f"{collection.config.migration.grace_hours:g} hours"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _size(count: int) -> str:
    sign, count = ("-" if count < 0 else ""), abs(count)
    return f"{sign}{count / 1e9:.1f} GB" if count >= 1e9 else f"{sign}{count / 1e6:.1f} MB"
