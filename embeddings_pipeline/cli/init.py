"""`init`: a project of one's own, for collections that are nobody's but its owner's."""

import importlib.util
import keyword
import os
import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated

import typer

from embeddings_pipeline.config.definition import COMPONENT_TYPE
from embeddings_pipeline.config.paths import expanded
from embeddings_pipeline.errors import ConfigurationError

# As this package has them: from the installed package, or from the checkout.
SHARED = ("dagster.yaml", "compose.yaml", "constraints.txt")
# Of compose.yaml: what is this package's own, and what a project called NAME has in its place.
COMPOSED = {
    r"^name: .*": "name: NAME",
    r"^  image: embeddings-pipeline:.*": "  image: NAME",
    r"^    args:$": "    args:\n      PIPELINE: ${PIPELINE:-embeddings-pipeline}",
}


def init(
    path: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Where to make it; it may be there, if it has none of the files.")
    ],
) -> None:
    """Make a project of your own: a folder for definitions, Dagster's settings, `.env`, and files for Docker."""
    if not path.strip():
        raise ConfigurationError("the folder has no name: `embeddings-pipeline init FOLDER`, or `.` for this one")
    folder = expanded(path).resolve()
    name = module_name(folder.name)
    contents = {file.format(name=name): text for file, text in project_files(name).items()}
    if there := [file for file in contents if os.path.lexists(folder / file)]:
        raise ConfigurationError(
            f"{folder} has {', '.join(there)} already, and nothing was written: name another folder"
        )
    try:
        for file, text in contents.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be written: {error.strerror}; name another folder") from error
    print(
        f"{folder}: made. In it, with DATABASE_URL in .env, or an embedded PostgreSQL without:\n"
        f"  dg scaffold defs {COMPONENT_TYPE} products --table products    # proposes a collection\n"
        f"  embeddings-pipeline sync                                       # embeds it\n"
        f"  embeddings-pipeline ui                                         # Dagster, with its sensor and schedules"
    )


def module_name(folder_name: str) -> str:
    """The name of the project's package: the folder's, as Python takes it, and of no other package's."""
    name = re.sub(r"[^a-z0-9_]+", "_", folder_name.lower()).strip("_") or "project"
    if name[0].isdigit() or keyword.iskeyword(name) or importlib.util.find_spec(name) is not None:
        name = f"project_{name}"
    return name


def project_files(name: str) -> dict[str, str]:
    """The project's files, by their path in it."""
    templates = files("embeddings_pipeline") / "project"
    shared = {path: _shared(path).read_text(encoding="utf-8") for path in SHARED}
    own = {
        "pyproject.toml": "pyproject.toml",
        "workspace.yaml": "workspace.yaml",
        "Dockerfile": "Dockerfile",
        ".env": "env",
        ".gitignore": "gitignore",
        ".dockerignore": "dockerignore",
        "{name}/definitions.py": "definitions.py.txt",
    }
    made = {path: (templates / file).read_text(encoding="utf-8").replace("NAME", name) for path, file in own.items()}
    shared["compose.yaml"] = _composed(shared["compose.yaml"], name)
    return {**shared, **made, "{name}/__init__.py": "", "{name}/defs/__init__.py": ""}


def _composed(text: str, name: str) -> str:
    """compose.yaml as a project of its own: Docker tells projects, and their images, apart by name."""
    for theirs, own in COMPOSED.items():
        text = re.sub(theirs, own.replace("NAME", name.replace("_", "-")), text, count=1, flags=re.MULTILINE)
    return text


def _shared(path: str) -> Traversable:
    packaged = files("embeddings_pipeline") / "project" / path
    return packaged if packaged.is_file() else Path(__file__).resolve().parents[2] / path
