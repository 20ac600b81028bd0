"""Who may do what with the tables and views of a model: read of one, and given to the one that takes its place.

Grants count by role, privilege and column, whoever gave them: the next owner gives them all. What an owner has of its
own table needs no grant.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import psycopg
from psycopg import sql

from embeddings_pipeline.errors import ModelChangeError
from embeddings_pipeline.store.destination.changes import Change
from embeddings_pipeline.store.sql import load_sql

ITSELF = "\x01"  # in a policy's conditions: the name of its table
COMMANDS = {"r": "SELECT", "a": "INSERT", "w": "UPDATE", "d": "DELETE", "*": "ALL"}
CATALOG = "ROW EXCLUSIVE of pg_class and pg_attribute, for which nobody waits"


class Grant(NamedTuple):
    """What one role may do."""

    role: str  # empty: PUBLIC
    privilege: str
    column: str  # empty: the whole
    grantable: bool


class Policy(NamedTuple):
    """A policy of row-level security."""

    name: str
    permissive: bool
    command: str
    roles: tuple[str, ...]  # empty text: PUBLIC
    using: str | None
    check: str | None


@dataclass(frozen=True)
class Rights:
    """Of one table or view."""

    owner: str
    grants: frozenset[Grant]
    row_security: bool = False
    forced: bool = False
    policies: frozenset[Policy] = frozenset()
    options: tuple[str, ...] = ()  # of a view: `security_invoker=true`


@dataclass(frozen=True)
class ModelRights:
    """Of all that the pipeline keeps of one model, in the order of `Destination.kept`."""

    kept: tuple[Rights, ...]
    view_options: tuple[str, ...]  # of the collection's view, whose owner and grants stay while the models change
    column: str = ""  # of a user's own table …
    column_grants: frozenset[Grant] = frozenset()  # … on that column by itself, which they do not name


def rights_of(connection: psycopg.Connection, relations: Sequence[sql.Identifier]) -> list[Rights]:
    """The rights of tables and views; of one that is not there, those that it gets when it is made."""
    names = [relation.as_string(connection) for relation in relations]
    rows = connection.execute(load_sql("rights/relations"), {"relations": names}).fetchall()
    return [
        Rights(
            owner,
            frozenset(Grant(*grant) for grant in grants),
            row_security,
            forced,
            frozenset(
                Policy(name, permissive, command, tuple(roles), using, check)
                for name, permissive, command, roles, using, check in policies
            ),
            tuple(sorted(options)),
        )
        for owner, grants, row_security, forced, policies, options in rows
    ]


def column_grants(connection: psycopg.Connection, table: sql.Identifier, column: str) -> frozenset[Grant]:
    """The grants on one column by itself, which they do not name: it may get another name."""
    parameters = {"table": table.as_string(connection), "column": column}
    rows = connection.execute(load_sql("rights/column"), parameters).fetchall()
    return frozenset(Grant(role, privilege, "", grantable) for role, privilege, grantable in rows)


def rights_changes(relation: sql.Identifier, own: Rights, wanted: Rights) -> list[Change]:
    """What gives a table or view the rights of another, which has the same columns."""
    alone = f"ACCESS EXCLUSIVE of {_words(relation)}"
    changes = []
    if own.owner != wanted.owner:
        owner = sql.SQL("ALTER TABLE {} OWNER TO {}").format(relation, sql.Identifier(wanted.owner))
        changes.append(Change(owner, alone))
    changes += grant_changes(
        relation,
        {grant for grant in own.grants if grant.role not in (own.owner, wanted.owner)},
        {grant for grant in wanted.grants if grant.role != wanted.owner},
    )
    changes += option_changes(relation, own.options, wanted.options)
    for word, was, should in (
        ("ROW LEVEL SECURITY", own.row_security, wanted.row_security),
        ("FORCE ROW LEVEL SECURITY", own.forced, wanted.forced),
    ):
        if was != should:
            words = word if word.startswith("FORCE") else f"ENABLE {word}"
            if not should:
                words = f"NO {word}" if word.startswith("FORCE") else f"DISABLE {word}"
            changes.append(Change(sql.SQL("ALTER TABLE {} {}").format(relation, sql.SQL(words)), alone))
    for policy in sorted(own.policies - wanted.policies):
        drop = sql.SQL("DROP POLICY {} ON {}").format(sql.Identifier(policy.name), relation)
        changes.append(Change(drop, alone))
    changes += [Change(_create_policy(relation, one), alone) for one in sorted(wanted.policies - own.policies)]
    return changes


def grant_changes(relation: sql.Identifier, own: Iterable[Grant], wanted: Iterable[Grant]) -> list[Change]:
    """What is revoked, with all that depends on it, and what is granted then."""
    own, wanted = set(own), set(wanted)
    surplus, missing = own - wanted, wanted - own
    changes = []
    for (role, _), grants in _by_role(surplus):
        words = sql.SQL("REVOKE {} ON {} FROM {} CASCADE").format(_privileges(grants), relation, _role(role))
        changes.append(Change(words, CATALOG))
    for (role, grantable), grants in _by_role(wanted if surplus else missing):
        words = sql.SQL("GRANT {} ON {} TO {}").format(_privileges(grants), relation, _role(role))
        changes.append(Change(words + sql.SQL(" WITH GRANT OPTION") if grantable else words, CATALOG))
    return changes


def option_changes(view: sql.Identifier, own: Sequence[str], wanted: Sequence[str]) -> list[Change]:
    """What gives a view the options of another."""
    alone = f"ACCESS EXCLUSIVE of {_words(view)}"
    changes = []
    gone = {option.partition("=")[0] for option in own} - {option.partition("=")[0] for option in wanted}
    if gone:
        names = sql.SQL(", ").join(sql.Identifier(name) for name in sorted(gone))
        changes.append(Change(sql.SQL("ALTER VIEW {} RESET ({})").format(view, names), alone))
    if more := [option.partition("=") for option in wanted if option not in own]:
        values = sql.SQL(", ").join(
            sql.SQL("{} = {}").format(sql.Identifier(name), sql.Literal(value)) for name, _, value in more
        )
        changes.append(Change(sql.SQL("ALTER VIEW {} SET ({})").format(view, values), alone))
    return changes


def check_rights(connection: psycopg.Connection, collection: str, relations: Sequence[sql.Identifier]) -> None:
    """ModelChangeError if this role may not give the owner and grants of these tables and views to another's."""
    names = [relation.as_string(connection) for relation in relations]
    for name, owner, me, may_change, may_give, may_own, sees_all in connection.execute(
        load_sql("rights/owners"), {"relations": names}
    ).fetchall():
        if not may_change or not may_give:
            problem = (
                f"{name} belongs to the role {owner!r}, and the pipeline's role {me!r} is no member of it, so the next "
                f"model's could not belong to it: GRANT {_quoted(owner)} TO {_quoted(me)}, or ALTER TABLE {name} OWNER "
                f"TO {_quoted(me)}"
            )
        elif not may_own:
            problem = (
                f"{name} belongs to the role {owner!r}, to which the next model's could not belong: GRANT CREATE ON "
                f"SCHEMA embeddings TO {_quoted(owner)}"
            )
        elif not sees_all:
            problem = (
                f"row-level security hides rows of {name} from the pipeline's own role {me!r}: ALTER TABLE {name} NO "
                f"FORCE ROW LEVEL SECURITY, or ALTER ROLE {_quoted(me)} BYPASSRLS"
            )
        else:
            continue
        raise ModelChangeError(f"collection {collection!r}: {problem}")


def _create_policy(relation: sql.Identifier, policy: Policy) -> sql.Composed:
    itself = relation.as_string(None).rpartition(".")[2]
    words = sql.SQL("CREATE POLICY {} ON {} AS {} FOR {} TO {}").format(
        sql.Identifier(policy.name),
        relation,
        sql.SQL("PERMISSIVE" if policy.permissive else "RESTRICTIVE"),
        sql.SQL(COMMANDS[policy.command]),
        sql.SQL(", ").join(_role(role) for role in policy.roles),
    )
    for word, condition in (("USING", policy.using), ("WITH CHECK", policy.check)):
        if condition is not None:
            words += sql.SQL(f" {word} ({condition.replace(ITSELF, itself)})")
    return words


def _by_role(grants: Iterable[Grant]) -> Iterable[tuple[tuple[str, bool], list[Grant]]]:
    def key(grant: Grant) -> tuple[str, bool]:
        return grant.role, grant.grantable

    return ((role, list(each)) for role, each in groupby(sorted(grants, key=lambda one: (key(one), one)), key))


def _privileges(grants: Sequence[Grant]) -> sql.Composed:
    """`SELECT, UPDATE (text_id, embedding)`."""
    words: list[sql.Composable] = []
    for (privilege, by_column), each in groupby(
        sorted(grants, key=lambda one: (one.privilege, one.column)), lambda one: (one.privilege, bool(one.column))
    ):
        columns = sql.SQL(", ").join(sql.Identifier(grant.column) for grant in each if by_column)
        words.append(sql.SQL("{} ({})").format(sql.SQL(privilege), columns) if by_column else sql.SQL(privilege))
    return sql.SQL(", ").join(words)


def _role(name: str) -> sql.Composable:
    return sql.Identifier(name) if name else sql.SQL("PUBLIC")


def _quoted(name: str) -> str:
    return sql.Identifier(name).as_string(None)


def _words(relation: sql.Identifier) -> str:
    return relation.as_string(None).replace('"', "")
