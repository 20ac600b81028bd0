"""Which collection and profile a command of `profile` is about."""

import sys
from typing import TYPE_CHECKING, Annotated

import click
import typer

from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.errors import ConfigurationError

if TYPE_CHECKING:
    from embeddings_pipeline.config.definition import CollectionDefinition
    from embeddings_pipeline.config.profiles import Profile
    from embeddings_pipeline.pipeline.collection import Collection

NameArgument = Annotated[str, typer.Argument(help="The profile's name: see `profile list`.")]


def open_chosen(definition: "CollectionDefinition") -> "Collection":
    """The collection, open."""
    from embeddings_pipeline.pipeline.collection import open_collection

    return open_collection(definition, load_settings())


def look_at_chosen(definition: "CollectionDefinition") -> "Collection":
    """The collection for what only looks."""
    from embeddings_pipeline.pipeline.collection import look_at_collection

    return look_at_collection(definition, load_settings())


def profile_named(definition: "CollectionDefinition", name: str) -> "Profile":
    """A built-in profile, or one of the collection's own. ProfileError if there is none."""
    from embeddings_pipeline.config.definition import named_profile

    return named_profile(definition, name, load_settings())


def declared_profile(definition: "CollectionDefinition") -> "Profile":
    """The profile that the definition or the environment names."""
    from embeddings_pipeline.config.profiles import resolve_profile

    return resolve_profile(definition.declared_profile, load_settings())


def known_profiles(definition: "CollectionDefinition") -> "list[Profile]":
    """The built-in profiles and the collection's own."""
    from embeddings_pipeline.config.profiles import BUILT_IN

    declared = declared_profile(definition)
    names = dict.fromkeys([*BUILT_IN, *definition.attributes.profiles])
    known = [profile_named(definition, name) for name in names]
    return known if declared.name in names else [declared, *known]


def ask_for_profile(definition: "CollectionDefinition", collection: "Collection") -> str:
    """The name of the profile that whoever sits at the terminal chooses, of those that may be switched to."""
    from embeddings_pipeline.config.weights import weights_here

    if not sys.stdin.isatty():
        raise ConfigurationError("name the profile to switch to: see `embeddings-pipeline profile list`")
    others = [profile for profile in known_profiles(definition) if profile.name != collection.profile.name]
    others = [profile for profile in others if _is_possible(profile, collection)]
    if not others:
        raise ConfigurationError("there is no other profile to switch to: see `embeddings-pipeline profile list`")
    print(
        f"{definition.name} is on {collection.profile.name} ({collection.profile.dimensions} dimensions).",
        file=sys.stderr,
    )
    for number, profile in enumerate(others, 1):
        far = "" if profile.provider != "local" or weights_here(profile) else "; to be downloaded"
        print(f"  {number}  {profile.name} ({profile.dimensions} dimensions, {profile.model}{far})", file=sys.stderr)
    chosen = typer.prompt("Switch to which", type=click.Choice([str(n) for n in range(1, len(others) + 1)]), err=True)
    return others[int(chosen) - 1].name


def _is_possible(profile: "Profile", collection: "Collection") -> bool:
    """Whether there is an encoder for it, and an index takes its vectors."""
    from embeddings_pipeline.encoders import PROVIDERS
    from embeddings_pipeline.store.destination.base import MOST_DIMENSIONS

    if profile.provider not in PROVIDERS:
        return False
    most = MOST_DIMENSIONS[collection.model.destination.storage]
    return profile.dimensions <= most or collection.definition.attributes.index.method == "none"
