"""What the UI shows of an asset: its declaration, and the parts of a materialization that are no plain numbers."""

import textwrap
from typing import Any

import dagster as dg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.index.faiss_read import Manifest
from embeddings_pipeline.index.pgvector import BuiltIndex, IndexReport

SAMPLE_WIDTH = 64  # characters a line; the UI does not wrap code


def source_metadata(definition: CollectionDefinition) -> dict[str, Any]:
    """Where the rows come from, and which columns are read."""
    source = definition.attributes.source
    columns = {
        "key": source.key,
        "template_columns": definition.template_columns,
        "payload": definition.attributes.columns,
    }
    return {
        "source": source.table or dg.MetadataValue.md(f"```sql\n{source.query}\n```"),
        **({"where": source.where} if source.where else {}),
        **{name: ", ".join(values) for name, values in columns.items() if values},
    }


def template_metadata(definition: CollectionDefinition) -> dict[str, Any]:
    """The template of each vector name."""
    return {f"template_{name}": template for name, template in definition.attributes.vectors.items()}


def view_metadata(definition: CollectionDefinition, dimensions: int) -> dict[str, Any]:
    """The view's name and columns, as Dagster's catalogue shows them."""
    columns = {
        "item_key": ("text", "the item's key; several key columns are a JSON array"),
        "vector_name": ("text", "which of the item's vectors"),
        "chunk": ("bigint", "number of the chunk, if long texts are split"),
        "text": ("text", "what was embedded"),
        "payload": ("jsonb", ", ".join(definition.attributes.columns) or "empty"),
        "embedding": (f"{definition.attributes.storage}({dimensions})", "the vector under the current model"),
    }
    schema = [dg.TableColumn(name, kind, description) for name, (kind, description) in columns.items()]
    return {
        "dagster/table_name": f"embeddings.{definition.name}",
        "dagster/column_schema": dg.TableSchema(schema),
    }


def index_metadata(report: IndexReport) -> dict[str, Any]:
    """Size and seconds, and a row for each index."""

    def row(index: BuiltIndex) -> dg.TableRecord:
        parameters = ", ".join(f"{name} = {value}" for name, value in index.parameters.items())
        return dg.TableRecord(
            {
                "vector_name": index.vector_name,
                "vectors": index.rows,
                "index": f"{index.method} ({parameters})",
                "built_because": index.reason or "not built: it is there and fits",
            }
        )

    return {
        "vectors": sum(index.rows for index in report.indexes),
        "build_seconds": report.build_seconds,
        "bytes": report.bytes,
        **({"indexes": dg.MetadataValue.table([row(index) for index in report.indexes])} if report.indexes else {}),
    }


def faiss_metadata(manifest: Manifest) -> dict[str, Any]:
    """What the manifest says of a generation."""
    return {
        "vectors": manifest.count,
        "seconds": manifest.seconds,
        "recall_at_10": manifest.recall_at_10,
        "bytes": manifest.bytes,
        "version": manifest.version,
        "generation": manifest.generation,
        "checksum": manifest.checksum,
        "index_type": ", ".join(f"{name} {part.index_type}" for name, part in manifest.vectors.items()),
    }


def as_markdown(texts: list[str]) -> str:
    """The texts as one code block, in which nothing counts as markup."""
    wrapped = (textwrap.fill(text.replace("`", "'"), SAMPLE_WIDTH) for text in texts)
    return "```text\n" + "\n\n".join(wrapped) + "\n```" if texts else "no text"
