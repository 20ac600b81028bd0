"""What the steps of a batch report, and the sum of it over a run."""

from dataclasses import dataclass, field, fields


@dataclass
class ItemsRead:
    """What reading one batch found, in items."""

    rows: int = 0
    gone: int = 0  # of the batch, and no longer in the source


@dataclass
class TextsRendered:
    """What rendering one batch gave, in texts and characters."""

    texts: int = 0  # to embed
    blank: int = 0
    characters: int = 0
    longest_characters: int = 0
    sample: list[str] = field(default_factory=list)  # the beginnings of the first texts


@dataclass
class Embedded:
    """What embedding one batch did, in texts."""

    embedded: int = 0  # by the model
    cached: int = 0  # whose vector the embedding cache knew
    reused: int = 0
    quarantined: int = 0
    truncated: int = 0
    tokens: int = 0
    usd: float = 0.0  # billed
    left_to_embed: int = 0  # because of `limit` or `dry_run`
    in_jobs: int = 0  # that batch jobs have: their vectors come later
    seconds: float = 0.0

    @property
    def texts_per_second(self) -> float:
        return round((self.embedded + self.cached) / self.seconds, 1) if self.seconds else 0.0

    @property
    def cache_hit_percent(self) -> float:
        """Of the texts that had no vector, those that the embedding cache knew."""
        wanted = self.embedded + self.cached
        return round(100 * self.cached / wanted, 2) if wanted else 0.0


@dataclass
class Committed:
    """What one commit did, in items, and how many vectors it wrote and deleted."""

    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    unchanged: int = 0
    quarantined: int = 0  # failed as a whole
    left: int = 0  # not committed: not whole, or changed since the run read it
    vectors_written: int = 0
    vectors_deleted: int = 0
    version: int = 0

    @property
    def coverage_percent(self) -> float:
        """Which share of the batch's items is committed as it is in the source now, or in quarantine."""
        covered = self.inserted + self.updated + self.unchanged + self.quarantined
        items = covered + self.left
        return round(100 * covered / items, 2) if items else 100.0


@dataclass
class RunFigures:
    """What a run did, over all its batches: the sum of what their steps report."""

    rows: int = 0
    gone: int = 0
    texts: int = 0
    blank: int = 0
    characters: int = 0
    embedded: int = 0
    cached: int = 0
    reused: int = 0
    quarantined: int = 0
    truncated: int = 0
    tokens: int = 0
    usd: float = 0.0
    left_to_embed: int = 0
    in_jobs: int = 0
    seconds: float = 0.0
    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    unchanged: int = 0
    left: int = 0
    vectors_written: int = 0
    vectors_deleted: int = 0

    def add(self, step: "ItemsRead | TextsRendered | Embedded | Committed | RunFigures") -> None:
        """Add what a step reports of one batch, or what a run did.

        AttributeError if it has a number that a run does not sum.
        """
        for figure in fields(step):
            if figure.name not in OF_ONE_BATCH:
                setattr(self, figure.name, getattr(self, figure.name) + getattr(step, figure.name))


OF_ONE_BATCH = ("longest_characters", "sample", "version")  # what has no sum
