"""A collection at work: with its database, ledger, source, lake and current model at hand."""

from dataclasses import asdict, dataclass, replace

import pyarrow as pa

from embeddings_pipeline.config.changed import check_as_read
from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.fingerprint import fingerprint
from embeddings_pipeline.config.model_words import model_warning, other_settings, with_model_prompts
from embeddings_pipeline.config.profiles import Profile, resolve_profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.weights import keep_digests
from embeddings_pipeline.encoders import load
from embeddings_pipeline.encoders.base import Encoder
from embeddings_pipeline.errors import LakeError, ProfileError, profile_command
from embeddings_pipeline.ledger.ledger import Ledger
from embeddings_pipeline.pipeline.renaming import check_not_being_renamed
from embeddings_pipeline.store.database import Database, open_database, open_database_to_read
from embeddings_pipeline.store.destination.factory import declared_storage, destination_of
from embeddings_pipeline.store.lake import Lake, open_lake
from embeddings_pipeline.store.models import Model, collection_identity, is_known, made_by
from embeddings_pipeline.store.schema import ensure_schema, has_schema
from embeddings_pipeline.store.source import Source


@dataclass(frozen=True)
class Collection:
    """A collection with all that its steps need: database, ledger, source, lake and the current model."""

    definition: CollectionDefinition
    settings: Settings
    database: Database
    ledger: Ledger
    source: Source
    lake: Lake
    model: Model  # the current one, or the one that `with_model` gave
    warning: str | None = None  # if the declared profile is not the current one
    model_warning: str | None = None  # what a person should know of how the model's files and the profile fit

    @property
    def profile(self) -> Profile:
        return self.model.profile

    @property
    def fingerprint(self) -> str:
        return self.model.destination.fingerprint

    @property
    def warnings(self) -> list[str]:
        """What whoever opens the collection is told."""
        return [warning for warning in (self.warning, self.model_warning) if warning]

    def encoder(self) -> Encoder:
        """The current model, loaded once a process. ProfileError if its weights are not those of the vectors."""
        actual, encoder = fingerprint(self.profile, self.settings.state_dir), None
        if actual == self.fingerprint or self.made_by(self.profile) == self.fingerprint:
            loaded = load(self.profile, self.settings)
            encoder = loaded.encoder if loaded.fingerprint == actual else None
            actual = loaded.fingerprint
        if encoder is None:
            raise ProfileError(
                f"collection {self.definition.name!r}: the weights of profile {self.profile.name!r} are not the ones "
                f"its vectors were made with (fingerprint {actual}, not {self.fingerprint}); bring back the "
                f"earlier weights of {self.profile.model}"
            )
        return encoder

    @property
    def adopts(self) -> bool:
        """Whether vectors that a user's own column has already are the current model's."""
        if self.definition.attributes.destination is None:
            return False
        declared = resolve_profile(self.definition.declared_profile, self.settings)
        return self.made_by(declared) == self.fingerprint

    def made_by(self, profile: Profile) -> str:
        """The fingerprint of the model whose vectors a profile makes. ProfileError."""
        return _made_by(self.ledger, profile, self.settings)

    def shadow_models(self) -> "list[Collection]":
        """The same collection with each shadow model, in its place."""
        return [self.with_model(model) for model in self.ledger.shadow_models()]

    def with_model(self, model: Model) -> "Collection":
        """The same collection with another of its models in the current one's place."""
        # What does not change vectors (device, batch size, where the weights lie) is this machine's.
        profile = resolve_profile(asdict(model.profile), self.settings)
        return replace(self, model=Model(profile, model.destination), warning=None, model_warning=None)

    def with_batch_settings(self, *, batch_size: int | None, tokens_per_batch: int | None) -> "Collection":
        """The same with other sizes of the encoder's batches, if they are given."""
        profile = replace(
            self.profile,
            batch_size=batch_size or self.profile.batch_size,
            tokens_per_batch=tokens_per_batch or self.profile.tokens_per_batch,
        )
        return replace(self, model=Model(profile, self.model.destination))

    def folder(self, asset: str) -> str:
        """The asset's folder in the lake."""
        if asset == "embeddings":
            return f"{self.definition.name}/embeddings/{self.fingerprint}"
        return f"{self.definition.name}/{asset}"

    def newest(self, asset: str, batch: int, run: str) -> tuple[str, pa.Table]:
        """Path and content of the asset's file of this batch: this run's, else the newest. LakeError without any."""
        newest = self.lake.newest(self.folder(asset), batch, run)
        if newest is None:
            raise LakeError(
                f"collection {self.definition.name!r}, batch {batch}: the lake has no {asset} of it; materialize "
                f"{asset} first, or run `embeddings-pipeline sync`"
            )
        return newest


def open_collection(definition: CollectionDefinition, settings: Settings, *, redefine: bool = False) -> Collection:
    """Open the database, register the definition, and find its current model; the first run activates the declared one.

    If another profile is declared than the current one, the current one stays and `warning` says so (rule 5).
    `redefine`: the definition counts, though a newer one is in force. Raises StaleDefinitionError, DatabaseError,
    SourceError or ProfileError.
    """
    check_as_read(definition)
    database = open_database(settings)
    ensure_schema(database)
    with database.session() as connection:
        check_not_being_renamed(connection, definition.name)
    ledger = Ledger(definition, database)
    ledger.register(redefine=redefine)
    declared, digest, trouble = _declared(ledger, settings)
    current = ledger.current()
    if digest and not _is(definition, current, digest):
        current = ledger.activate(with_model_prompts(declared), digest)
    keep_digests(settings.state_dir)
    assert current is not None
    return _opened(ledger, settings, declared, digest, current, trouble)


def look_at_collection(definition: CollectionDefinition, settings: Settings) -> Collection:
    """As `open_collection` for what only looks: nothing is written, registered or activated.

    Before a vector is committed the model is the declared one, whose tables may not be there. StaleDefinitionError.
    """
    check_as_read(definition)
    is_elsewhere = definition.attributes.source.url is not None  # the source is read, whatever is here
    database = (open_database if is_elsewhere else open_database_to_read)(settings)
    if has_schema(database):
        with database.session() as connection:
            check_not_being_renamed(connection, definition.name)
    ledger = Ledger(definition, database)
    declared, digest, trouble = _declared(ledger, settings)
    current = ledger.current()
    if digest and not ledger.has_vectors() and not _is(definition, current, digest):
        with database.connect(autocommit=True) as connection:
            storage = declared_storage(connection, definition)
        current = Model(declared, destination_of(definition, digest, declared.dimensions, storage))
    assert current is not None
    return _opened(ledger, settings, declared, digest, current, trouble)


def _is(definition: CollectionDefinition, model: Model | None, digest: str) -> bool:
    """Whether a model has this fingerprint, and its vectors are stored as the definition says."""
    if model is None or model.destination.fingerprint != digest:
        return False
    return definition.attributes.destination is not None or model.destination.storage == definition.attributes.storage


def _made_by(ledger: Ledger, profile: Profile, settings: Settings) -> str:
    digest = fingerprint(profile, settings.state_dir)
    with ledger.database.session() as connection:
        return made_by(connection, ledger.definition.name, digest)


def _declared(ledger: Ledger, settings: Settings) -> tuple[Profile, str | None, str | None]:
    """The declared profile, and its fingerprint; or why that cannot be known, if the database has another model."""
    declared = resolve_profile(ledger.definition.declared_profile, settings)
    try:
        return declared, _made_by(ledger, declared, settings), None
    except ProfileError as error:
        if not ledger.has_vectors():
            raise
        return declared, None, str(error)


def _opened(
    ledger: Ledger, settings: Settings, declared: Profile, digest: str | None, current: Model, trouble: str | None
) -> Collection:
    definition = ledger.definition
    warning = told = None
    if digest == current.destination.fingerprint:
        # What does not change vectors (device, batch size, where the weights lie) is the declared profile's.
        current = Model(declared, current.destination)
        if told := model_warning(declared):
            told = f"collection {definition.name!r}: {told}"
    else:
        warning = _other_profile(definition, declared, current, trouble)
    storage = None if definition.attributes.destination else definition.attributes.storage
    if storage not in (None, current.destination.storage):
        warning = (
            f"collection {definition.name!r}: `storage: {definition.attributes.storage}` is declared, but its vectors "
            f"are stored as {current.destination.storage}, which stays; give it a collection of its own to change that"
        )
    database, lake = ledger.database, open_lake(settings)
    with database.session() as connection:
        if is_known(connection, definition.name):
            lake = replace(lake, identity=collection_identity(connection, definition.name))
    source = Source(definition, database)
    return Collection(definition, settings, database, ledger, source, lake, current, warning, told)


def _other_profile(definition: CollectionDefinition, declared: Profile, current: Model, trouble: str | None) -> str:
    """The warning that another profile is declared than the vectors were made with; `trouble`: it cannot be used."""
    if definition.attributes.destination is None:
        key, environment = "`profile:`", " or EMBEDDING_PROFILE"
    else:
        key, environment = "`destination.profile:`", ""
    if trouble:
        return (
            f"collection {definition.name!r}: the declared profile cannot be used: {trouble}. Its vectors were made "
            f"with {current.profile.name!r} ({current.profile.model}), which stays current"
        )
    if (declared.name, declared.model) == (current.profile.name, current.profile.model):
        other = other_settings(declared, current.profile)
        return (
            f"collection {definition.name!r}: its vectors were made with another profile {declared.name!r} than the "
            f"declared one ({other or 'other weights'}), and stay current; make them anew with "
            f"`{profile_command(f'switch {declared.name}', definition.name)}`, or declare what made them ({key} in "
            f"{definition.path or 'defs.yaml'})"
        )
    return (
        f"collection {definition.name!r}: profile {declared.name!r} ({declared.model}) is declared, but its "
        f"vectors were made with {current.profile.name!r} ({current.profile.model}), which stays current; "
        f"move to the declared one with `{profile_command(f'switch {declared.name}', definition.name)}`, or declare "
        f"the current one ({key} in {definition.path or 'defs.yaml'}{environment})"
    )
