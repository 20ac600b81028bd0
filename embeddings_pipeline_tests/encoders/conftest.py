"""What tests of hosted models share."""

import pytest

from embeddings_pipeline.encoders import hosted


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits between attempts, shortened."""
    monkeypatch.setattr(hosted, "FIRST_WAIT", 0.01)
