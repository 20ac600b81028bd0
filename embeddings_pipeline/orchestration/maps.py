"""The asset of the map, with a picture of it."""

import base64
import re

import dagster as dg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.index.map_build import ensure_map
from embeddings_pipeline.index.map_picture import colours_of, picture, swatch
from embeddings_pipeline.index.map_read import Chart, Legend, is_number, open_map
from embeddings_pipeline.orchestration.asset_options import asset_options
from embeddings_pipeline.orchestration.resources import PipelineResource
from embeddings_pipeline.orchestration.steps import failures_kept, open_logged

MOST_POINTS = 100_000  # of a picture
MOST_PICTURES = 3  # of a materialization: each vector name has one


def build_map_asset(definition: CollectionDefinition) -> list[dg.AssetsDefinition]:
    """The asset `map`, unless the definition wants none."""
    if definition.attributes.map.method == "none":
        return []

    @dg.asset(**asset_options(definition, "map", {"python", "postgres"}, ["pgvector_table"], partitioned=False))
    def map_asset(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> dg.MaterializeResult:
        """A picture of all items: each a point, near to those that are like it. The service's page shows it. Made anew
        after a change of the model or of `map:`, and when the table has changed, if that is quick or a day has passed.

        Numbers: `items` on the map; `left_out`, which have no vector (yet); `variance`, what share of the vectors'
        differences two axes have; `seconds` that it took.
        """
        with failures_kept(definition, "map"):
            collection = open_logged(context, pipeline, definition)
            folder = collection.settings.state_dir / "faiss"
            made = ensure_map(collection.database, collection.model.destination, folder, definition)
            chart = open_map(folder, definition.name)
        assert chart is not None  # it was made
        manifest = chart.manifest
        return dg.MaterializeResult(
            metadata={
                "items": manifest.items,
                "left_out": manifest.left_out,
                "variance": min((each.variance for each in manifest.vectors.values()), default=0.0),
                "seconds": manifest.seconds,
                "bytes": manifest.bytes,
                "method": ", ".join(f"{name} {each.method}" for name, each in manifest.vectors.items()),
                "made_because": made.reason or "not made: it is there and fits",
                "made_at": manifest.made_at,
                **{f"picture_{name}": dg.MetadataValue.md(text) for name, text in pictures(chart).items()},
            }
        )

    return [map_asset]


def pictures(chart: Chart) -> dict[str, str]:
    """Vector name → its map as Markdown, coloured by the first column, with what the colours mean."""
    column = next(iter(chart.manifest.legends), None)
    legend = chart.manifest.legends[column] if column else None
    made = {}
    for name in list(chart.manifest.vectors)[:MOST_PICTURES]:
        points = chart.points(name, column, MOST_POINTS)
        drawn = _image(f"map of {len(points.keys):,} items", picture(points.at, points.colours, legend))
        made[name] = drawn + (f"\n\n{_words(column)}: {_meaning(legend)}" if column and legend else "")
    return made


def _meaning(legend: Legend) -> str:
    colours = colours_of(legend)
    if is_number(legend.type):
        if legend.low is None or legend.high is None:
            return "no values"
        return f"{legend.low:g} {_image('from low to high', swatch(colours))} {legend.high:g}"
    return " · ".join(
        f"{_image('', swatch([colour]))} {_words(name)} {count:,}"
        for colour, name, count in zip(colours, legend.categories, legend.counts, strict=True)
    )


def _image(words: str, png: bytes) -> str:
    return f"![{words}](data:image/png;base64,{base64.b64encode(png).decode()})"


def _words(text: str) -> str:
    """What is in the database, as text in which nothing counts as markup."""
    return re.sub(r"[^\w ]|_", lambda found: f"&#{ord(found[0])};", text)
