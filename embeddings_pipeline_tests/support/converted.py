"""Models made ready for OpenVINO in this process, which has imported torch already: its own takes seconds for each."""

from dataclasses import asdict, replace
from pathlib import Path

from embeddings_pipeline.config.model_words import with_model_prompts
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.weights import resolve_weights, weights_digest
from embeddings_pipeline.encoders.convert import answer_to
from embeddings_pipeline.encoders.openvino import OpenVinoEncoder, Readiness


def convert(profile: Profile, folder: Path) -> OpenVinoEncoder:
    """The profile's encoder, its model converted into the folder and compared. Raises Refused."""
    folder.mkdir(parents=True)
    weights = resolve_weights(profile)
    used = replace(with_model_prompts(profile), model=str(weights))
    task = {"profile": asdict(used), "weights": weights_digest(weights), "threads": 2}
    answer = answer_to({**task, "new": str(folder), "converted": None})
    return OpenVinoEncoder(used, folder, Readiness(**answer["readiness"]), answer["precision"], threads=2)
