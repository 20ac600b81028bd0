"""The map of a collection over HTTP: a sample of its points, and those of items that are asked for."""

import logging
from typing import Annotated, Any

import psycopg
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.errors import DatabaseError, NotFoundError
from embeddings_pipeline.index.map_picture import NOTHING, OTHERS, colours_of
from embeddings_pipeline.index.map_read import NONE, OTHER, Chart, MapManifest, ShownPoints, open_map
from embeddings_pipeline.index.standing import Standing, standing
from embeddings_pipeline.search.arguments import MOST_HITS
from embeddings_pipeline.search.from_files import known_outage
from embeddings_pipeline.serve.requests import Text
from embeddings_pipeline.serve.served import Served
from embeddings_pipeline.store.database import open_database_to_read

log = logging.getLogger(__name__)

POINTS, MOST_POINTS = 20_000, 50_000
NOT_KNOWN = "not known: the database cannot be reached"


class MapRequest(BaseModel):
    """Which points of which map."""

    model_config = ConfigDict(extra="forbid")

    collection: Text | None = Field(None, description="Which collection; left out: the only one, or `items`.")
    vector: Text | None = Field(None, description="Which of the items' vectors; left out: the first.")
    colour: Text | None = Field(None, description="By which of `legends` points are coloured; left out: by none.")
    points: StrictInt = Field(POINTS, ge=0, le=MOST_POINTS, description="At most so many, a sample of all.")
    keys: Annotated[list[Text], Field(max_length=MOST_HITS)] = Field(
        [], description="Keys of items that are to be found on the map, whether they are in the sample or not."
    )

    def answer(self, served: Served, settings: Settings) -> dict[str, Any]:
        definition = served.find(self.collection)
        chart = _chart(definition, settings)
        vector = self.vector or next(iter(chart.manifest.vectors))
        return {
            "collection": definition.name,
            "vector": vector,
            "colour": self.colour,
            **_described(chart.manifest, vector),
            "standing": _standing(definition, settings, chart.manifest),
            "points": _columns(chart.points(vector, self.colour, self.points)),
            "found": _columns(chart.of_keys(self.keys, vector, self.colour)),
        }


class PointsAnswer(BaseModel):
    """Items in columns: the nth of each is the nth item's."""

    keys: list[str]
    labels: list[str] = Field(description="The first column of the payload, else the key.")
    x: list[float]
    y: list[float]
    colours: list[float | None] = Field(
        description=f"Numbers (times: seconds since 1970), or places in `categories`; {OTHER}: another one, {NONE}: "
        "none. Empty without `colour`."
    )


class LegendAnswer(BaseModel):
    """What the colours of a column mean."""

    type: str
    categories: list[str] = Field(description="The most frequent ones; of several texts the first counts.")
    counts: list[int]
    low: float | None = Field(description="Of numbers: nearly all are between `low` and `high`.")
    high: float | None
    colours: list[str] = Field(description="Of each category; of numbers from low to high.")


class MapAnswer(BaseModel):
    """A map."""

    collection: str
    vector: str
    colour: str | None
    vectors: list[str] = Field(description="Each has a map.")
    legends: dict[str, LegendAnswer]
    other: str = Field(description="The colour of less frequent categories.")
    none: str = Field(description="The colour of items without a value.")
    method: str
    variance: float = Field(description="What share of the vectors' differences the two directions of `pca` have.")
    items: int = Field(description="How many items have a point.")
    left_out: int = Field(description="How many have no vector (yet).")
    made_at: str
    standing: str = Field(description="`current`, `behind` (the table has changed since), or `of another model`.")
    points: PointsAnswer
    found: PointsAnswer


def _chart(definition: CollectionDefinition, settings: Settings) -> Chart:
    """NotFoundError if there is no map."""
    name = definition.name
    if definition.attributes.map.method == "none":
        raise NotFoundError(f"collection {name!r} has no map: its `map:` says `method: none`")
    chart = open_map(settings.state_dir / "faiss", name)
    if chart is None or not chart.manifest.vectors:
        raise NotFoundError(f"collection {name!r} has no map yet: `embeddings-pipeline sync` makes it")
    return chart


def _standing(definition: CollectionDefinition, settings: Settings, manifest: MapManifest) -> str:
    """What the map is to the table. NotFoundError if it is of another database's items."""
    if known_outage(settings):
        return NOT_KNOWN
    try:
        with open_database_to_read(settings).session() as connection:
            stands = standing(connection, definition.name, manifest)
    except (DatabaseError, psycopg.Error):
        return NOT_KNOWN
    if stands is Standing.FOREIGN:
        raise NotFoundError(
            f"collection {definition.name!r}: its map is of another database, or of a state that this one no longer "
            "has; `embeddings-pipeline sync` makes it anew"
        )
    return stands.value


def _described(manifest: MapManifest, vector: str) -> dict[str, Any]:
    placed = manifest.vectors.get(vector)
    legends = {name: {**vars(legend), "colours": colours_of(legend)} for name, legend in manifest.legends.items()}
    return {
        "vectors": list(manifest.vectors),
        "legends": legends,
        "other": OTHERS,
        "none": NOTHING,
        "method": placed.method if placed else manifest.method,
        "variance": placed.variance if placed else 0.0,
        "items": placed.items if placed else 0,
        "left_out": manifest.left_out + manifest.items - (placed.items if placed else 0),
        "made_at": manifest.made_at,
    }


def _columns(points: ShownPoints) -> dict[str, Any]:
    x, y = points.at.astype(float).round(4).T.tolist()
    colours = [] if points.colours is None else points.colours.tolist()
    return {"keys": points.keys, "labels": points.labels, "x": x, "y": y, "colours": colours}
