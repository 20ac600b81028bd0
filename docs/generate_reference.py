"""docs/reference/cli.md and defs-yaml.md, from the code: python docs/generate_reference.py [--check]

`--check` writes nothing, and exits with 1 if a page is not what the code says.
"""

import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import click
import typer
from pydantic import TypeAdapter

from embeddings_pipeline.cli.main import app
from embeddings_pipeline.config.profiles import BUILT_IN, Profile
from embeddings_pipeline.orchestration.component import EmbeddingCollection

REFERENCE = Path(__file__).parent / "reference"
PROGRAM = "embeddings-pipeline"
KEYS = ("key", "type", "default", "meaning")
GENERATED = "<!-- Written by docs/generate_reference.py from the code: change it there. -->"


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or (`--check`) say which of them are not current; the exit code."""
    pages = {"cli.md": command_line(), "defs-yaml.md": definition()}
    stale = [name for name, text in pages.items() if _read(REFERENCE / name) != text]
    if "--check" not in arguments:
        for name in stale:
            (REFERENCE / name).write_text(pages[name], encoding="utf-8")
            print(f"written: docs/reference/{name}")
        return 0
    for name in stale:
        print(f"docs/reference/{name} is not what the code says: run `python docs/generate_reference.py`")
    return 1 if stale else 0


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


# --- the command line ---------------------------------------------------------------------------------------------


def command_line() -> str:
    """The page of all commands, in the order in which `--help` lists them."""
    root = typer.main.get_command(app)
    parts = [
        GENERATED,
        "# Command line",
        "`embeddings-pipeline COMMAND …` in the environment that the package is installed in, or `python -m "
        "embeddings_pipeline COMMAND …`. Each command has `--help`. One that takes long says every nine seconds, in a "
        "pipe too, that it goes on.",
        "The exit code is 0 only if all went well; 1 with one line on stderr that names the thing and the remedy; 2 "
        "for wrong usage; 3 if a budget is spent; 130 if you interrupted it. Errors and warnings go to stderr, results "
        "to stdout.",
    ]
    commands = list(_commands(root, ""))
    rows = [(f"[`{path}`](#{_anchor(path)})", _first_line(command)) for path, command in commands]
    parts = [*map(_wrapped, parts), _table(("command", "does"), rows)]
    parts += [_command_section(path, command) for path, command in commands]
    return "\n\n".join(parts) + "\n"


def _commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield path, command
        return
    for name, sub in command.commands.items():
        if not sub.hidden:
            yield from _commands(sub, f"{path} {name}".strip())


def _command_section(path: str, command: click.Command) -> str:
    context = click.Context(command, info_name=path)
    usage = " ".join([PROGRAM, path, *command.collect_usage_pieces(context)])
    parts = [f"## {path}", _wrapped(inspect.cleandoc(command.help or "")), f"```\n{usage}\n```"]
    arguments = [one for one in command.params if isinstance(one, click.Argument)]
    options = [one for one in command.params if isinstance(one, click.Option) and not one.hidden]
    if arguments:
        helps = _argument_helps(command)
        rows = [(f"`{one.make_metavar(context)}`", helps.get(str(one.name), "")) for one in arguments]
        parts.append(_table(("argument", "meaning"), rows))
    if options:
        told = [(_option_name(one, context), _default(one), one.help or "") for one in options]
        parts.append(_table(("option", "default", "meaning"), told))
    return "\n\n".join(parts)


def _first_line(command: click.Command) -> str:
    return inspect.cleandoc(command.help or "").split("\n\n")[0].replace("\n", " ")


def _argument_helps(command: click.Command) -> dict[str, str]:
    """Argument → its help, from the function itself: click 8.5 loses it on the way through Typer 0.25."""
    hints = get_type_hints(command.callback, include_extras=True)
    notes = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: note[0].help or "" for name, note in notes.items() if note and hasattr(note[0], "help")}


def _option_name(option: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in sorted(option.opts, key=len, reverse=True))
    if option.is_flag:
        return ", ".join([names, *(f"`{name}`" for name in option.secondary_opts)])
    return f"{names} `{option.make_metavar(context)}`"


def _default(option: click.Option) -> str:
    default = option.default
    return "" if default in (None, False, (), []) or callable(default) else f"`{default}`"


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


# --- defs.yaml ----------------------------------------------------------------------------------------------------


def definition() -> str:
    """The page of all keys of a `defs.yaml`, from the pydantic model that validates it."""
    schema = EmbeddingCollection.get_model_cls().model_json_schema()
    parts = [
        GENERATED,
        "# defs.yaml",
        "A collection is one file, `embeddings_pipeline/defs/<folder>/defs.yaml`. A key that is not known, and a value "
        "that cannot be used, is refused in one line that names the file, the line and the nearest key that exists.",
        "```yaml\ntype: embeddings_pipeline.EmbeddingCollection\n\nattributes:\n  name: items\n"
        "  source: {table: movies, key: [id], updated_at: updated_at}\n  columns: [title, release_year]\n"
        '  vectors:\n    base: "{title} | {overview}"\n```',
        "The tables below are the keys of `attributes:` and of the mappings within it.",
    ]
    parts = [*map(_wrapped, parts), _model_section("attributes", schema)]
    nested = schema.get("$defs", {})
    for key, value in schema["properties"].items():
        name = _referenced(value)
        if name is not None:
            parts.append(_model_section(f"attributes.{key}", nested[name]))
    parts.append(_model_section("attributes.filters.COLUMN", nested["FilterDefinition"]))
    parts.append(_model_section("attributes.words.fusion", nested["FusionDefinition"]))
    parts.append(_model_section("attributes.words.fusion.weights", nested["FusionWeights"]))
    parts.append(_profile_section())
    return "\n\n".join(parts) + "\n"


def _model_section(title: str, schema: Mapping[str, Any]) -> str:
    described = inspect.cleandoc(schema.get("description", ""))
    return "\n\n".join([f"## {title}", _wrapped(described), _table(KEYS, _rows(schema, title))])


def _rows(schema: Mapping[str, Any], title: str = "attributes") -> list[tuple[str, str, str, str]]:
    """The properties of a model, whose section has that title: key, type, default, meaning."""
    required = set(schema.get("required", ()))
    return [
        (
            f"`{key}`",
            _type(value, f"{title}.{key}"),
            "required" if key in required else _default_of(value),
            value.get("description", ""),
        )
        for key, value in schema["properties"].items()
    ]


def _default_of(value: Mapping[str, Any]) -> str:
    default = value.get("default")
    # A mapping has a section of its own, with its defaults.
    return "" if default is None or isinstance(default, dict | list) else f"`{json.dumps(default)}`"


def _type(value: Mapping[str, Any], path: str) -> str:
    if (name := _referenced(value)) is not None:
        return "[mapping](#a-profile)" if name == "Profile" else f"[mapping](#{_anchor(path)})"
    if "enum" in value:
        return " or ".join(f"`{one}`" for one in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if choices := value.get("anyOf") or value.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(one, path) for one in choices if one.get("type") != "null"))
    names = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
    kind = value.get("type", "")
    if kind == "array":
        return f"list of {_type(value.get('items', {}), path) or 'values'}"
    return names.get(kind, "mapping" if kind == "object" else "")


def _referenced(value: Mapping[str, Any]) -> str | None:
    """The name of the model that a property is, alone or beside null."""
    for one in (value, *value.get("anyOf", ()), *value.get("allOf", ())):
        if "$ref" in one:
            return str(one["$ref"]).rsplit("/", 1)[-1]
    return None


def _profile_section() -> str:
    built_in = [
        (f"`{one.name}`", f"`{one.provider}`", one.model, str(one.dimensions), str(one.max_length or ""))
        for one in BUILT_IN.values()
    ]
    return "\n\n".join(
        [
            "## A profile",
            _wrapped(
                "`profile:` is a name, or a mapping with these keys; `profiles:` maps names to such mappings, without "
                "`name`. The fingerprint covers the model's files, `provider`, `dimensions`, `normalize`, "
                "`document_prompt`, `max_length`, `bidirectional` and `weights`: a change of one makes another model. "
                "`embeddings-pipeline profile show NAME` prints it. What a local model's own files say where the "
                "profile says nothing: [A model's own words](../how-to/changing-the-model.md#a-models-own-words)."
            ),
            _table(KEYS, _rows(TypeAdapter(Profile).json_schema())),
            "Built in:",
            _table(("profile", "provider", "model", "dimensions", "tokens read"), built_in),
        ]
    )


def _wrapped(text: str) -> str:
    """Prose in lines of 120."""
    return text if "\n" in text else textwrap.fill(text, 120, break_on_hyphens=False)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
