"""Handing a collection's texts to the Batch API, whose answers later runs find in the embedding cache."""

import logging
from collections.abc import Mapping

import numpy as np

from embeddings_pipeline.config.prices import Api, is_hosted
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.templates import clean, visible
from embeddings_pipeline.encoders.batch_jobs import BatchJobs
from embeddings_pipeline.encoders.batch_submit import OfBatches, Submission, Submitter
from embeddings_pipeline.encoders.limits import estimated_tokens, limits_of
from embeddings_pipeline.encoders.tokens import count_tokens
from embeddings_pipeline.errors import ConfigurationError, PipelineError
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.pipeline.paid import terms_of
from embeddings_pipeline.progress import Progress, silent

log = logging.getLogger(__name__)


def check_named(api: str) -> Api:
    """ConfigurationError if a launchpad names another one."""
    if api not in ("direct", "batch"):
        raise ConfigurationError(f"`api: {api}` in the run's configuration: it may be `direct` or `batch`")
    return "batch" if api == "batch" else "direct"


def check_api(profile: Profile, api: Api) -> None:
    """ConfigurationError if the profile's model cannot be asked so."""
    if api == "batch" and not is_hosted(profile):
        raise ConfigurationError(
            f"`api: batch` is for hosted models, and profile {profile.name!r} is of provider {profile.provider}: leave "
            "it out"
        )


def look_at_jobs(collection: Collection, progress: Progress = silent) -> None:
    """See what the collection's batch jobs have answered by now, and bring it into the cache. What goes wrong is told:
    the answers stay where they are.
    """
    jobs = BatchJobs(collection.database, collection.settings, collection.definition.name)
    for job in jobs.due(now=True):
        progress("fetching", 0, 0)
        try:
            jobs.look(job)
        except PipelineError as error:
            log.warning("warning: collection %r: batch job %s: %s", collection.definition.name, job[:8], error)


def submit_texts(collection: Collection, texts: Mapping[bytes, str], batches: OfBatches) -> Submission:
    """Submit those of the texts (by content hash) that are not answered and not submitted yet. `batches`: whose texts
    they are.

    A text that may be too long for the model is left: what becomes of it is decided where it is asked about directly.
    Raises BudgetError, OutageError, ProfileError.
    """
    profile, most = collection.profile, limits_of(collection.profile).tokens_per_input
    cleaned = {digest: clean(text) for digest, text in texts.items() if visible(text)}
    if most and cleaned:
        prompted = [(profile.document_prompt or "") + text for text in cleaned.values()]
        fits = np.asarray(estimated_tokens(prompted) <= most)
        cleaned = {digest: text for (digest, text), is_short in zip(cleaned.items(), fits, strict=True) if is_short}
    if not cleaned:
        return Submission()
    terms = terms_of(collection, collection.encoder(), "batch")
    tokens = dict(zip(cleaned, count_tokens(profile, list(cleaned.values())).tolist(), strict=True))
    with Submitter(collection.database, collection.settings, profile, terms) as submitter:
        return submitter.submit(cleaned, tokens, batches)
