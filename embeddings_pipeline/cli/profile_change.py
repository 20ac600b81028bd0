"""`profile plan`, `switch`, `status`, `rollback` and `contract`: moving a collection from one model to another."""

import sys
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embeddings_pipeline.cli.console import (
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
from embeddings_pipeline.cli.profile_choice import NameArgument, ask_for_profile, open_chosen, profile_named
from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.errors import ModelChangeError

if TYPE_CHECKING:
    from embeddings_pipeline.config.definition import CollectionDefinition
    from embeddings_pipeline.config.profiles import Profile
    from embeddings_pipeline.model_change.state import ModelChange, Progress
    from embeddings_pipeline.orchestration.switch import SwitchResult
    from embeddings_pipeline.pipeline.collection import Collection
    from embeddings_pipeline.store.models import Model


def plan(name: NameArgument, collection_name: CollectionOption = None, as_json: JsonOption = False) -> None:
    """Every statement of a switch in order, with its lock, duration and disk. Nothing is done."""
    from embeddings_pipeline.model_change.plan import plan as plan_of

    definition = chosen_collection(collection_name)
    collection = open_chosen(definition)
    planned = plan_of(collection, profile_named(definition, name))
    if as_json:
        print_json([asdict(step) for step in planned])
        return
    phase = ""
    for step in planned:
        if step.phase != phase:
            phase = step.phase
            print(f"-- {phase}")
        room = f", {size(step.bytes)}" if step.bytes else ""
        print(f"{step.statement};")
        print(f"--   {step.lock}; about {duration(step.seconds)}{room}")
    total = size(sum(step.bytes for step in planned if step.bytes > 0))
    print(f"-- {total} of disk meanwhile. The encoding comes to that: `profile switch {name}` measures it, and asks.")


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
    from embeddings_pipeline.model_change.state import candidate_profile, open_change
    from embeddings_pipeline.orchestration.switch import SwitchResult
    from embeddings_pipeline.orchestration.switch import switch as run_switch

    definition = chosen_collection(collection_name)
    collection = open_chosen(definition)
    name = name or ask_for_profile(definition, collection)
    profile = candidate_profile(collection, name)
    change = open_change(collection)
    new = None if change is None else change.shadow if change.phase == "expanded" else change.current
    if change is not None and new is not None and new.profile.name != profile.name:
        raise ModelChangeError(
            f"collection {definition.name!r}: a change to {new.profile.name} is open ({change.phase}); finish "
            f"or undo it first: `embeddings-pipeline profile status`"
        )
    if change is not None and change.phase == "swapped":
        done = SwitchResult(definition.name, change.previous.profile.name, profile.name)
        words = (
            f"{definition.name}: {profile.name} is the current model already; see `embeddings-pipeline profile status`"
        )
    else:
        if not yes:
            _ask(collection, profile)
        with progress_bar(definition.name, show=not as_json) as progress:
            done = run_switch(definition, load_settings(), name, progress_of=progress)
        words = _switched(done, definition.attributes.model_change.grace_hours)
    if as_json:
        print_json(asdict(done))
    else:
        print(words)
    _declare(definition, name, write=write)


def _ask(collection: "Collection", profile: "Profile") -> None:
    """Say what a switch costs, and ask whether to start it."""
    from embeddings_pipeline.model_change.plan import price

    cost = price(collection, profile)
    print(
        f"{collection.definition.name}: {collection.profile.name} → {profile.name}: {cost.texts:,} texts, about "
        f"{cost.tokens:,} tokens and {duration(cost.seconds)} on this machine, {size(cost.bytes)} on the database's "
        "disk",
        file=sys.stderr,
    )
    confirm("Start?", "there is no terminal to ask on: give --yes to start")


def _switched(done: "SwitchResult", grace_hours: float) -> str:
    figures = f"recall@10 of its index {done.recall_at_10:.3f}" if done.recall_at_10 is not None else ""
    if done.ndcg_candidate is not None:
        figures += f", nDCG@10 {done.ndcg_current:.3f} → {done.ndcg_candidate:.3f}"
    elif done.neighbour_overlap is not None:
        figures += f", {done.neighbour_overlap:.0%} of the nearest ten as before"
    return (
        f"{done.collection}: {done.previous} → {done.profile}: {done.embedded:,} texts embedded, "
        f"{done.quarantined:,} in quarantine; {figures}; locked for {done.locked_ms:.1f} ms; {done.seconds:.1f} s\n"
        f"Undo: `embeddings-pipeline profile rollback`. Finish: `profile contract`, after {grace_hours:g} hours."
    )


def status(collection_name: CollectionOption = None, as_json: JsonOption = False) -> None:
    """The current model, those kept current beside it, and the change that is under way."""
    from embeddings_pipeline.model_change.state import open_change, progress

    definition = chosen_collection(collection_name)
    collection = open_chosen(definition)
    change = open_change(collection)
    shadows = [(model, progress(collection, model)) for model in collection.ledger.shadow_models()]
    if as_json:
        print_json(_status_dict(collection, change, shadows))
    else:
        _print_status(collection, change, shadows)


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
        f"{collection.profile.name} is kept current: `profile switch` brings it back, `profile rollback` once more "
        "drops it"
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


def _declare(definition: "CollectionDefinition", name: str, *, write: bool) -> None:
    """Say, or make, the change in defs.yaml, without which each command warns."""
    from embeddings_pipeline.config.editing import write_profile

    destination = definition.attributes.destination
    declared, key = definition.declared, "profile" if destination is None else "destination.profile"
    declared = declared if declared is None or isinstance(declared, str) else declared.name
    if declared == name or definition.path is None:
        return
    if write:
        write_profile(definition.path, name, in_destination=destination is not None)
        print(f"{definition.path}: {key}: {name}", file=sys.stderr)
    elif declared is None:
        print(f"Set EMBEDDING_PROFILE={name}, or `profile: {name}` in {definition.path}.", file=sys.stderr)
    else:
        print(f"Set `{key}: {name}` in {definition.path} (--write does it).", file=sys.stderr)
