"""Everything killed at random moments: in the end the table is what a clean build of the same source is."""

from embeddings_pipeline_tests.process import chaos


def test_what_was_killed_at_random_ends_as_a_clean_build() -> None:
    found = chaos.run(5, seed=11, say=lambda line: None)
    assert sum(found["killed"].values()) == 5 and found["edits"] > 0 and found["vectors"] > 0
