"""What changes the schema is data: a plan prints it, and a run executes it."""

from typing import NamedTuple

from psycopg import sql


class Change(NamedTuple):
    """A statement that changes something, and its lock: PostgreSQL's name, and of what."""

    statement: sql.Composed
    lock: str
    grows: bool = False  # what it takes grows with the number of vectors
