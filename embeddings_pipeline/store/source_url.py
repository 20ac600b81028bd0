"""The database of `source.url:`, if the source is not in the pipeline's own."""

import re
from urllib.parse import quote

import psycopg

from embeddings_pipeline.config.settings import environment_value
from embeddings_pipeline.errors import ConfigurationError, SourceError
from embeddings_pipeline.store.session import SOURCE_NETWORK
from embeddings_pipeline.store.urls import UnreadableAddress, read_address, without_secrets

_VARIABLE = re.compile(r"\$\{(\w+)\}")


def expand_environment(url: str) -> str:
    """`${NAME}` replaced from the environment or the project's `.env`, so that no password stands in a file.

    A value is one part of the address, and quoted as that part needs it: `p@ss/word` is written as it is. An address
    that begins with `${NAME}` begins with the value as it is.
    """
    return _VARIABLE.sub(lambda match: _quoted(_value(match[1]), url[: match.start()], url[match.end() :]), url)


def _value(name: str) -> str:
    value = environment_value(name)
    if value is None:
        raise ConfigurationError(f"`source.url:` names ${{{name}}}, which is not set; export it or put it in .env")
    return value


def _quoted(value: str, before: str, after: str) -> str:
    """A value as it is put in between two parts of an address."""
    before = before.strip()
    if not before:
        return value
    _, is_url, rest = before.partition("://")
    if is_url:
        is_host = not re.search("[/?]", rest) and "@" not in re.split("[/?]", after)[0]
        return quote(value, safe=":,[]" if is_host else "")
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'" if before.endswith("=") else escaped


def connect_url(url: str) -> psycopg.Connection:
    """A connection to the database of `source.url:`. ConfigurationError if it is no address (which is never repeated),
    SourceError if it does not answer.
    """
    try:
        parts = read_address(expand_environment(url))
    except UnreadableAddress as error:
        raise ConfigurationError(
            f"`source.url:` {error} (the value of a variable, as in postgresql://user:${{PASSWORD}}@host:5432/name, is "
            "written as it is)"
        ) from None
    try:
        # Without prepared statements, which a pooler's other sessions do not know.
        return psycopg.connect(autocommit=True, prepare_threshold=None, **{**SOURCE_NETWORK, **parts})
    except psycopg.OperationalError as error:
        said = without_secrets(" ".join(str(error).split()), parts)
        raise SourceError(f"the database of `source.url:` cannot be used: {said}; check the URL") from error
