"""`profile plan`, `switch`, `status`, `rollback` and `contract`: moving a collection from one model to another."""

import sys
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embeddings_pipeline.cli.console import (
    ApiOption,
    CollectionOption,
    JsonOption,
    YesOption,
    chosen_collection,
    confirm,
    duration,
    print_json,
    progress_bar,
    size,
)
from embeddings_pipeline.cli.profile_choice import (
    NameArgument,
    ask_for_profile,
    declared_profile,
    look_at_chosen,
    open_chosen,
    profile_named,
)
from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.errors import ConfigurationError, ModelChangeError, profile_command
from embeddings_pipeline.wording import counted

if TYPE_CHECKING:
    from embeddings_pipeline.config.definition import CollectionDefinition
    from embeddings_pipeline.config.prices import Api
    from embeddings_pipeline.config.profiles import Profile
    from embeddings_pipeline.model_change.plan import PlannedPhase, Price
    from embeddings_pipeline.model_change.state import ModelChange, Progress
    from embeddings_pipeline.orchestration.switch import SwitchResult
    from embeddings_pipeline.pipeline.collection import Collection
    from embeddings_pipeline.store.models import Model


def plan(
    name: NameArgument,
    collection_name: CollectionOption = None,
    api: ApiOption = "direct",
    as_json: JsonOption = False,
) -> None:
    """The price of a switch; its phases with their duration, locks, disk and undo; then every statement in order.
    Nothing is done, and a model that takes money is asked nothing; what `switch` would refuse is refused.
    """
    from embeddings_pipeline.model_change.plan import phases, price
    from embeddings_pipeline.model_change.plan import plan as plan_of

    definition = chosen_collection(collection_name)
    collection, profile = look_at_chosen(definition), profile_named(definition, name)
    planned = plan_of(collection, profile)
    cost = price(collection, profile, _api(api))
    if as_json:
        told = {"collection": definition.name, "current": collection.profile.name, "candidate": name}
        shown = [asdict(phase) for phase in phases(planned, cost)]
        print_json({**told, "price": asdict(cost), "phases": shown, "statements": list(map(asdict, planned))})
        return
    print(f"-- {definition.name}: {collection.profile.name} → {name}: {_counted(cost)}")
    for batch, quote in cost.quotes.items():
        print(f"-- batch {batch}: {quote.in_words()}")
    if cost.quote is not None:
        print(f"-- {cost.basis}")
        print(f"-- {name} was asked nothing: `profile switch` asks it about a plain sentence before anything else")
    print_phases(phases(planned, cost))
    phase = ""
    for step in planned:
        if step.phase != phase:
            phase = step.phase
            print(f"-- {phase}")
        room = f", {size(step.bytes)}" if step.bytes else ""
        print(f"{step.statement};")
        print(f"--   {step.lock}; about {duration(step.seconds)}{room}")


def print_phases(phases: "list[PlannedPhase]") -> None:
    """A table, as comments of SQL."""
    rows = [("phase", "duration", "disk", "undo", "others wait, for some milliseconds, at")]
    for each in phases:
        waits = ", ".join(each.locks) or "nothing"
        rows.append((each.phase, duration(each.seconds), size(each.bytes) if each.bytes else "-", each.undo, waits))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for *columns, last in rows:
        print("-- " + "  ".join([f"{text:<{width}}" for text, width in zip(columns, widths, strict=True)] + [last]))


def switch(
    name: Annotated[
        str | None, typer.Argument(help="The profile's name; left out, a terminal offers the choice.")
    ] = None,
    collection_name: CollectionOption = None,
    api: ApiOption = "direct",
    yes: YesOption = False,
    write: Annotated[bool, typer.Option("--write", help="Change `profile:` in the collection's defs.yaml.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Move a collection to another model, while it is searched and written to. It can be undone: `profile rollback`."""
    from embeddings_pipeline.model_change.preflight import check_candidate
    from embeddings_pipeline.model_change.state import candidate_profile, open_change
    from embeddings_pipeline.orchestration.switch import SwitchResult
    from embeddings_pipeline.orchestration.switch import switch as run_switch

    definition = chosen_collection(collection_name)
    collection = look_at_chosen(definition)
    name = name or ask_for_profile(definition, collection)
    profile = candidate_profile(collection, name)
    if write:
        _check_declarable(definition, name)
    change = open_change(collection)
    new = None if change is None else change.shadow if change.phase == "expanded" else change.current
    if change is not None and new is not None and new.profile.name != profile.name:
        raise ModelChangeError(
            f"collection {definition.name!r}: a change to {new.profile.name} is open ({change.phase}); finish "
            f"or undo it first: `{profile_command('status', definition.name)}`"
        )
    if change is None:
        check_candidate(collection, profile)  # what is refused is refused before anybody is asked
    if change is not None and change.phase == "swapped":
        done = SwitchResult(definition.name, change.previous.profile.name, profile.name)
        words = (
            f"{definition.name}: {profile.name} is the current model already; see "
            f"`{profile_command('status', definition.name)}`"
        )
    else:
        if not yes:
            _ask(collection, profile, api)
        with progress_bar(definition.name, show=not as_json) as progress:
            done = run_switch(definition, load_settings(), name, api=_api(api), progress_of=progress)
        words = _switched(done, definition.attributes.model_change.grace_hours)
    if as_json:
        print_json(asdict(done))
    else:
        print(words)
    if not done.in_jobs:
        _declare(definition, name, write=write)


def _api(api: str) -> "Api":
    return "batch" if api == "batch" else "direct"


def _ask(collection: "Collection", profile: "Profile", api: str) -> None:
    """Say what a switch costs, and ask whether to start it."""
    from embeddings_pipeline.model_change.plan import price

    cost = price(collection, profile, _api(api))
    takes = "" if cost.quote is not None else f" and {duration(cost.seconds)} on this machine"
    print(
        f"{collection.definition.name}: {collection.profile.name} → {profile.name}: {_counted(cost)}{takes}, "
        f"{size(cost.bytes)} on the database's disk",
        file=sys.stderr,
    )
    confirm("Start?", "there is no terminal to ask on: give --yes to start")


def _counted(cost: "Price") -> str:
    if cost.quote is not None:
        return cost.quote.in_words()
    return f"{cost.texts:,} texts to encode, about {cost.tokens:,} tokens"


def _switched(done: "SwitchResult", grace_hours: float) -> str:
    if done.in_jobs:
        return (
            f"{done.collection}: {counted(done.in_jobs, 'text')} of {done.profile} are with batch jobs, and answered "
            f"within a day (`embeddings-pipeline batch-job list`); {done.previous} goes on serving. The same command "
            "goes on when they have ended"
        )
    figures = f"recall@10 of its index {done.recall_at_10:.3f}" if done.recall_at_10 is not None else ""
    if done.ndcg_candidate is not None:
        figures += f", nDCG@10 {done.ndcg_current:.3f} → {done.ndcg_candidate:.3f}"
    elif done.neighbour_overlap is not None:
        figures += f", {done.neighbour_overlap:.0%} of the nearest ten as before"
    return (
        f"{done.collection}: {done.previous} → {done.profile}: {counted(done.embedded, 'text')} embedded, "
        f"{done.quarantined:,} in quarantine; {figures}; locked for {done.locked_ms:.1f} ms; {done.seconds:.1f} s\n"
        f"Undo: `{profile_command('rollback', done.collection)}`. Finish, after {grace_hours:g} hours: "
        f"`{profile_command('contract', done.collection)}`."
    )


def status(collection_name: CollectionOption = None, as_json: JsonOption = False) -> None:
    """The current model, those kept current beside it, and the change that is under way."""
    from embeddings_pipeline.model_change.state import open_change, progress

    definition = chosen_collection(collection_name)
    collection = look_at_chosen(definition)
    if not collection.ledger.has_vectors():
        _print_empty(collection, as_json=as_json)
        return
    change = open_change(collection)
    shadows = [(model, progress(collection, model)) for model in collection.ledger.shadow_models()]
    if as_json:
        print_json(_status_dict(collection, change, shadows))
    else:
        _print_status(collection, change, shadows)


def _print_empty(collection: "Collection", *, as_json: bool) -> None:
    """Nothing is committed, so no model is current."""
    name, declared = collection.definition.name, collection.profile.name
    if as_json:
        print_json({"collection": name, "current": None, "declared": declared, "beside": [], "migration": None})
    else:
        command = f"`embeddings-pipeline sync --collection {name}`"
        print(f"{name}: no vector is there yet; {command} makes them with {declared}")


def _status_dict(
    collection: "Collection", change: "ModelChange | None", shadows: "list[tuple[Model, Progress]]"
) -> dict[str, Any]:
    return {
        "collection": collection.definition.name,
        "current": {"profile": collection.profile.name, "fingerprint": collection.fingerprint},
        "beside": [
            {"profile": model.profile.name, "fingerprint": model.destination.fingerprint, **vars(done)}
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


def _print_status(
    collection: "Collection", change: "ModelChange | None", shadows: "list[tuple[Model, Progress]]"
) -> None:
    definition = collection.definition
    print(
        f"{definition.name}: {collection.profile.name} ({collection.fingerprint}), "
        f"{collection.model.destination.dimension} dimensions, current"
    )
    for model, done in shadows:
        print(
            f"  beside it {model.profile.name} ({model.destination.fingerprint}), {model.destination.dimension} "
            "dimensions: "
            f"{done.backfilled:,} of {counted(done.batches, 'batch')} backfilled"
        )
    if change is None:
        print("  no change of the model is under way")
    elif change.phase == "expanded":
        print(
            f"  a change to {change.candidate.profile.name} began {change.expanded_at:%Y-%m-%d %H:%M %Z}; go on with "
            f"`{profile_command(f'switch {change.candidate.profile.name}', definition.name)}`, undo it with "
            f"`{profile_command('rollback', definition.name)}`"
        )
    elif change.swapped_at is not None:
        ends = change.swapped_at + timedelta(hours=definition.attributes.model_change.grace_hours)
        print(
            f"  changed from {change.previous.profile.name} {change.swapped_at:%Y-%m-%d %H:%M %Z}; "
            f"`{profile_command('rollback', definition.name)}` undoes it at once; "
            f"`{profile_command('contract', definition.name)}` drops {change.previous.profile.name}, from "
            f"{ends:%Y-%m-%d %H:%M %Z} on"
        )


def rollback(collection_name: CollectionOption = None, yes: YesOption = False, as_json: JsonOption = False) -> None:
    """Bring the previous model back at once; before the swap, drop the candidate instead."""
    from embeddings_pipeline.model_change.phases import roll_back
    from embeddings_pipeline.model_change.state import open_change

    definition = chosen_collection(collection_name)
    collection = open_chosen(definition)
    change = open_change(collection)
    if change is not None and change.phase == "expanded" and not yes:
        confirm(
            f"Drop what was embedded for {change.candidate.profile.name}?",
            "nothing has been swapped: --yes drops what was embedded for the candidate",
        )
    done = roll_back(collection, "rollback")
    if as_json:
        current = open_chosen(definition).profile.name
        print_json({"collection": definition.name, "current": current, "swapped_back": done is not None})
        return
    if done is None:
        print(f"{definition.name}: the change was ended; {collection.profile.name} serves as before")
        return
    back = open_chosen(definition)
    print(
        f"{definition.name}: {back.profile.name} is the current model again, locked for "
        f"{done.exclusive.locked_ms:.1f} ms; "
        f"{collection.profile.name} is kept current: "
        f"`{profile_command(f'switch {collection.profile.name}', definition.name)}` brings it back, "
        f"`{profile_command('rollback', definition.name)}` once more drops it"
    )
    _declare(definition, back.profile.name, write=False)


def contract(
    collection_name: CollectionOption = None,
    now: Annotated[bool, typer.Option("--now", help="Within the grace period too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Drop the previous model. After it there is no way back."""
    from embeddings_pipeline.model_change.phases import contract as run_contract
    from embeddings_pipeline.model_change.state import open_change

    definition = chosen_collection(collection_name)
    collection = open_chosen(definition)
    change = open_change(collection)
    done = run_contract(collection, now=now)
    previous = change.previous.profile.name if change else "the previous model"
    if as_json:
        print_json({"collection": definition.name, "dropped": previous, "current": collection.profile.name})
        return
    print(f"{definition.name}: {previous} was dropped in {done.transaction_ms:.0f} ms; {collection.profile.name} stays")


def _check_declarable(definition: "CollectionDefinition", name: str) -> None:
    """ConfigurationError, before anything is done, if --write could not write the profile's name."""
    if _is_declared(definition, name) or definition.path is None or _may_write(definition, name):
        return
    key = "profile" if definition.attributes.destination is None else "destination.profile"
    raise ConfigurationError(
        f"{definition.path}: --write cannot set `{key}: {name}` there, since the file cannot be written, or what "
        f"stands there is not a name; leave --write out, and set it by hand after the switch"
    )


def _is_declared(definition: "CollectionDefinition", name: str) -> bool:
    declared = definition.declared or declared_profile(definition)
    return name == (declared if isinstance(declared, str) else declared.name)


def _may_write(definition: "CollectionDefinition", name: str) -> bool:
    from embeddings_pipeline.config.editing import may_write_profile

    assert definition.path is not None
    in_destination = definition.attributes.destination is not None
    return may_write_profile(definition.path, definition.name, name, in_destination=in_destination)


def _declare(definition: "CollectionDefinition", name: str, *, write: bool) -> None:
    """Say, or make, the change in defs.yaml, without which each command warns."""
    from embeddings_pipeline.config.editing import write_profile
    from embeddings_pipeline.config.profiles import BUILT_IN

    destination = definition.attributes.destination
    key = "profile" if destination is None else "destination.profile"
    if _is_declared(definition, name) or definition.path is None:
        return
    if write:
        write_profile(definition.path, definition.name, name, in_destination=destination is not None)
        print(f"{definition.path}: {key}: {name}", file=sys.stderr)
    elif definition.declared is None and name in BUILT_IN and name not in definition.attributes.profiles:
        print(f"Set EMBEDDING_PROFILE={name}, or `profile: {name}` in {definition.path}.", file=sys.stderr)
    else:
        by_itself = " (`profile switch --write` does it)" if _may_write(definition, name) else ""
        print(f"Set `{key}: {name}` in {definition.path}{by_itself}.", file=sys.stderr)
