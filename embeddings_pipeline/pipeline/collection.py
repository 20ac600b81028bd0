"""A collection at work: with its database, ledger, source, lake and active model at hand."""

from dataclasses import asdict, dataclass, replace

import pyarrow as pa

from embeddings_pipeline.config.definition import Collection
from embeddings_pipeline.config.profiles import Profile, fingerprint, resolve_profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline.encoders.base import Encoder
from embeddings_pipeline.errors import LakeError, ProfileError
from embeddings_pipeline.ledger.ledger import ActiveModel, Ledger
from embeddings_pipeline.store.database import Database, ensure_schema, open_database
from embeddings_pipeline.store.lake import Lake, open_lake
from embeddings_pipeline.store.source import Source


@dataclass(frozen=True)
class OpenCollection:
    """A collection with all that its steps need: database, ledger, source, lake and the active model."""

    collection: Collection
    settings: Settings
    database: Database
    ledger: Ledger
    source: Source
    lake: Lake
    active: ActiveModel
    warning: str | None = None  # where the declared profile is not the active one

    @property
    def profile(self) -> Profile:
        return self.active.profile

    @property
    def fingerprint(self) -> str:
        return self.active.table.fingerprint

    def encoder(self) -> Encoder:
        """The active model, loaded once a process. ProfileError where its weights are not those of the vectors."""
        there = fingerprint(self.profile, self.settings.state_dir)
        if there != self.fingerprint:
            raise ProfileError(
                f"collection {self.collection.name!r}: the weights of profile {self.profile.name!r} are not the ones "
                f"its vectors were made with (fingerprint {there}, not {self.fingerprint}); bring back the former "
                f"weights of {self.profile.model}"
            )
        return load_encoder(self.profile)

    @property
    def adopts(self) -> bool:
        """Whether vectors that a user's own column has already are the active model's."""
        if self.collection.config.target is None:
            return False
        declared = resolve_profile(self.collection.declared_profile, self.settings)
        return fingerprint(declared, self.settings.state_dir) == self.fingerprint

    def beside(self) -> "list[OpenCollection]":
        """The same collection with each model that is kept current beside the active one, in its place."""
        return [self.with_model(model) for model in self.ledger.beside()]

    def with_model(self, model: ActiveModel) -> "OpenCollection":
        """The same collection with another of its models in the active one's place."""
        # What does not change vectors (device, batch size, where the weights lie) is this machine's.
        profile = resolve_profile(asdict(model.profile), self.settings)
        return replace(self, active=ActiveModel(profile, model.table), warning=None)

    def with_batch_settings(self, *, batch_size: int | None, tokens_per_batch: int | None) -> "OpenCollection":
        """The same with other sizes of the encoder's batches, where they are given."""
        profile = replace(
            self.profile,
            batch_size=batch_size or self.profile.batch_size,
            tokens_per_batch=tokens_per_batch or self.profile.tokens_per_batch,
        )
        return replace(self, active=ActiveModel(profile, self.active.table))

    def folder(self, asset: str) -> str:
        """The asset's folder in the lake."""
        if asset == "embeddings":
            return f"{self.collection.name}/embeddings/{self.fingerprint}"
        return f"{self.collection.name}/{asset}"

    def newest(self, asset: str, batch: int, run: str) -> tuple[str, pa.Table]:
        """Path and content of the asset's file of this batch: this run's, else the newest. LakeError without any."""
        found = self.lake.newest(self.folder(asset), batch, run)
        if found is None:
            raise LakeError(
                f"collection {self.collection.name!r}, batch {batch}: the lake has no {asset} of it; materialize "
                f"{asset} first, or run `embeddings-pipeline sync`"
            )
        return found


def open_collection(collection: Collection, settings: Settings) -> OpenCollection:
    """Open the database, register the collection, and find its active model; the first run activates the declared one.

    Where the declared profile is another than the active one, the active one stays and `warning` says so (rule 5).
    """
    database = open_database(settings)
    ensure_schema(database)
    ledger = Ledger(collection, database)
    ledger.register()
    declared = resolve_profile(collection.declared_profile, settings)
    active, warning = ledger.active(), None
    declared_fingerprint = None
    try:
        declared_fingerprint = fingerprint(declared, settings.state_dir)
    except ProfileError:
        if active is None:
            raise
    if declared_fingerprint and (active is None or active.table.fingerprint != declared_fingerprint):
        active = ledger.activate(declared, declared_fingerprint)
    assert active is not None
    if declared_fingerprint == active.table.fingerprint:
        # What does not change vectors (device, batch size, where the weights lie) is the declared profile's.
        active = ActiveModel(declared, active.table)
    else:
        adopted = collection.config.target is not None
        key = "`target.profile:`" if adopted else "`profile:`"
        where = "" if adopted else " or EMBEDDING_PROFILE"
        warning = (
            f"collection {collection.name!r}: profile {declared.name!r} ({declared.model}) is declared, but its "
            f"vectors were made with {active.profile.name!r} ({active.profile.model}), which stays active; "
            f"move to the declared one with `embeddings-pipeline profile switch {declared.name}`, or declare the "
            f"active one ({key} in {collection.path or 'defs.yaml'}{where})"
        )
    if collection.config.target is None and active.table.storage != collection.config.storage:
        warning = (
            f"collection {collection.name!r}: `storage: {collection.config.storage}` is declared, but its vectors are "
            f"stored as {active.table.storage}, which stays; give it a collection of its own to change that"
        )
    source = Source(collection, database)
    return OpenCollection(collection, settings, database, ledger, source, open_lake(settings), active, warning)
