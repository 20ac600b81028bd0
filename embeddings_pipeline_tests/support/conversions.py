"""Models that tests have converted: a profile of a small one, what was kept, and loading as a new process would."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.encoders.base import Encoder

Load = Callable[..., Encoder]


def profile_of(folder: Path, **settings: Any) -> Profile:
    return Profile(
        **{"name": "mine", "provider": "local", "model": str(folder), "dimensions": 32, "device": "cpu", **settings}
    )


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the last `load` told people."""
    ours = (record for record in caplog.records if record.name.startswith("embeddings_pipeline"))
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


def kept(state: Path) -> Path:
    [folder] = [each for each in (state / "encoders").iterdir() if (each / "manifest.json").exists()]
    return folder
