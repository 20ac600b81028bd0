"""Addresses of databases: whatever libpq takes, a URL or `host=… dbname=…`, is read by libpq and by nothing else."""

import os
import re
from collections.abc import Mapping
from urllib.parse import quote

import psycopg
from psycopg.conninfo import conninfo_to_dict

Parts = dict[str, str]

LOOKS_LIKE = "it looks like postgresql://user:password@host:5432/name"
ENCODED = "/, @, : and % in the password are written %2F, %40, %3A and %25"
_SCHEME = re.compile(r"postgres(ql)?(\+psycopg2?)?://")
_ANY_SCHEME = re.compile(r"[a-zA-Z][\w+.-]*://")
_UNKNOWN_PARAMETER = re.compile(r'invalid URI query parameter: "\w+"')  # libpq's words, which hold no password


class UnreadableAddress(ValueError):
    """An address that libpq cannot read. The message never repeats it: it may hold a password."""


def read_address(address: str) -> Parts:
    """The parts of an address, by libpq's names for them. UnreadableAddress: its message goes on after the address's
    name, as in `DATABASE_URL cannot be read: …`.
    """
    address = address.strip()
    if not _SCHEME.match(address) and (_ANY_SCHEME.match(address) or "=" not in address):
        raise UnreadableAddress(f"does not name a PostgreSQL database: {LOOKS_LIKE}")
    try:
        read = conninfo_to_dict(re.sub(rf"^{_SCHEME.pattern}", "postgresql://", address))
    except psycopg.ProgrammingError as error:
        unknown = _UNKNOWN_PARAMETER.match(str(error))
        if unknown and "@" not in address.partition("?")[2]:
            raise UnreadableAddress(
                f"cannot be read: {unknown[0]}; leave it out, since only libpq's own parameters belong there"
            ) from None
        raise _unreadable() from None
    parts = {name: str(value) for name, value in read.items()}
    authority, _, path = address.partition("://")[2].partition("/")
    password_in_path = ":" in authority and "@" not in authority and "@" in path.partition("?")[0]
    if password_in_path or "@" in parts.get("host", "") or not re.fullmatch(r"[\d,]*", parts.get("port", "")):
        raise _unreadable()  # the end of a password is taken for another part
    return parts


def _unreadable() -> UnreadableAddress:
    return UnreadableAddress(f"cannot be read: {LOOKS_LIKE}, and {ENCODED}")


def url_of(parts: Mapping[str, str]) -> str:
    """The URL of these parts as libpq reads it: several hosts and socket folders stand in its query."""
    rest = dict(parts)
    user, password, name = (quote(rest.pop(part, ""), safe="") for part in ("user", "password", "dbname"))
    owner = f"{user}:{password}@" if password else f"{user}@" if user else ""
    query = "&".join(f"{part}={quote(value, safe='/,:')}" for part, value in rest.items())
    return f"postgresql://{owner}/{name}" + (f"?{query}" if query else "")


def database_name(parts: Mapping[str, str]) -> str:
    """The name of the database in an address's parts: as in libpq, the user's if nothing names it."""
    names = (parts.get("dbname"), os.environ.get("PGDATABASE"), parts.get("user"), os.environ.get("PGUSER"))
    return next((name for name in names if name), "postgres")


def without_secrets(message: str, parts: Mapping[str, str]) -> str:
    """A message without the passwords of an address."""
    for secret in {parts.get("password") or "", parts.get("sslpassword") or ""} - {""}:
        message = message.replace(secret, "…").replace(quote(secret, safe=""), "…")
    return message
