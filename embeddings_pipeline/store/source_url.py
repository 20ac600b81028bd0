"""The database of `source.url:`, if the source is not in the pipeline's own."""

import os
import re
from urllib.parse import quote

import psycopg
from dotenv import dotenv_values
from psycopg.conninfo import conninfo_to_dict

from embeddings_pipeline.config.settings import project_root
from embeddings_pipeline.errors import ConfigurationError, SourceError

CONNECT_SECONDS = 10


def expand_environment(url: str) -> str:
    """`${NAME}` replaced from the environment or the project's `.env`, so that no password stands in a file."""

    def value(match: re.Match[str]) -> str:
        setting = os.environ.get(match[1]) or dotenv_values(project_root() / ".env").get(match[1])
        if setting is None:
            raise ConfigurationError(
                f"`source.url:` names ${{{match[1]}}}, which is not set; export it or put it in .env"
            )
        return setting

    return re.sub(r"\$\{(\w+)\}", value, url)


def connect_url(url: str) -> psycopg.Connection:
    """A connection to the database of `source.url:`. ConfigurationError if it is no URL (which is never repeated),
    SourceError if it does not answer.
    """
    url = re.sub(r"^postgres(ql)?(\+psycopg2?)?://", "postgresql://", expand_environment(url).strip())
    try:
        parts = conninfo_to_dict(url)
        if "@" in f"{parts.get('host')}{parts.get('port')}":  # the end of a password
            raise ValueError
    except (psycopg.ProgrammingError, ValueError):  # its message would show the password
        raise ConfigurationError(
            "`source.url:` cannot be read: it looks like postgresql://user:${PASSWORD}@host:5432/name, and /, @, : "
            "and % in the password are written %2F, %40, %3A and %25"
        ) from None
    try:
        return psycopg.connect(url, autocommit=True, connect_timeout=CONNECT_SECONDS)
    except psycopg.OperationalError as error:
        said = " ".join(str(error).split())
        for secret in {str(parts.get("password") or ""), quote(str(parts.get("password") or ""), safe="")} - {""}:
            said = said.replace(secret, "…")
        raise SourceError(f"the database of `source.url:` cannot be used: {said}; check the URL") from error
