"""The same model at another place: a profile that gives a model's own vectors becomes a maker of them."""

from dataclasses import asdict

from psycopg.types.json import Jsonb

from embeddings_pipeline.config.fingerprint import fingerprint
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline.errors import ModelChangeError, profile_command
from embeddings_pipeline.health.drift import LEAST_COSINE, Drift, measure
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.store.models import bind


def rebind(collection: Collection, profile: Profile, least_cosine: float = LEAST_COSINE) -> Drift:
    """Encode the canaries with `profile`, and note it as a maker of the current model's vectors if each of them comes
    out as it was: with a cosine of at least `least_cosine`. Returns how they compare; nothing is embedded anew.

    Writes: a row of embeddings.maker. Raises ModelChangeError if the vectors are others, or none is known yet.
    """
    name = collection.definition.name
    maker = fingerprint(profile, collection.settings.state_dir)
    if maker == collection.fingerprint:
        raise ModelChangeError(f"collection {name!r}: profile {profile.name!r} makes its vectors already")
    if not _has_canaries(collection):
        raise ModelChangeError(f"collection {name!r} has no vectors to compare with; `embeddings-pipeline sync` first")
    drift = measure(collection, load_encoder(profile, collection.settings))
    if drift.lowest_cosine < least_cosine:
        raise ModelChangeError(
            f"collection {name!r}: profile {profile.name!r} gives other vectors than {collection.profile.name!r}: of "
            f"{drift.texts} texts the lowest cosine is {drift.lowest_cosine:.4f} (mean {drift.mean_cosine:.4f}), and "
            f"{least_cosine} is asked for; `{profile_command(f'switch {profile.name}', name)}` moves to it"
        )
    values = {
        "collection": name,
        "maker": maker,
        "fingerprint": collection.fingerprint,
        "profile": Jsonb(asdict(profile)),
        "cosine": drift.lowest_cosine,
    }
    with collection.database.connect(autocommit=True) as connection:
        bind(connection, values)
    return drift


def _has_canaries(collection: Collection) -> bool:
    query = "SELECT EXISTS (SELECT FROM embeddings.canary WHERE collection = %s AND fingerprint = %s)"
    with collection.database.connect(autocommit=True) as connection:
        row = connection.execute(query, [collection.definition.name, collection.fingerprint]).fetchone()
    return row == (True,)
