"""`dg scaffold defs embeddings_pipeline.EmbeddingCollection NAME --table T`: a `defs.yaml` that works at once."""

import re
import shutil

import click
import dagster as dg
from pydantic import BaseModel, Field

from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.pipeline.propose import propose_collection


class CollectionParams(BaseModel):
    """What the scaffolder asks for."""

    table: str = Field(description="The table to embed: `movies` or `schema.movies`.")
    key: list[str] | None = Field(default=None, description="A column that identifies a row; again for a second one.")
    url: str | None = Field(default=None, description="Another PostgreSQL database that holds it, else the pipeline's.")


class CollectionScaffolder(dg.Scaffolder[CollectionParams]):
    """Looks at the user's table and writes a `defs.yaml` for it, with every choice explained."""

    @classmethod
    def get_scaffold_params(cls) -> type[CollectionParams]:
        return CollectionParams

    def scaffold(self, request: dg.ScaffoldRequest[CollectionParams]) -> None:
        name = re.sub(r"\W+", "_", request.target_path.name.lower())
        try:
            params = request.params
            text = propose_collection(name, params.table, params.url, load_settings(), params.key or ())
        except PipelineError as error:
            if request.target_path.is_dir() and not any(request.target_path.iterdir()):
                shutil.rmtree(request.target_path)
            raise click.ClickException(str(error)) from error
        request.target_path.mkdir(parents=True, exist_ok=True)
        (request.target_path / "defs.yaml").write_text(text, encoding="utf-8")
