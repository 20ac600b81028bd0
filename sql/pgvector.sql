-- The ANN indexes. {index}: its name; {method}, {operator_class}, {parameters}: hnsw or ivfflat and how it is built;
-- {vector_name}: a literal.


-- name: create
-- One ANN index a vector name: in an index over several names, filtering would starve the rare ones.

CREATE INDEX CONCURRENTLY {index} ON {vector}
USING {method} (embedding {operator_class}) WITH ({parameters})
WHERE vector_name = {vector_name}


-- name: describe
-- The ANN indexes of a model table, built by us or not, valid or not. %(table)s: its name in the schema embeddings.

SELECT
    named.relname                                   AS name,
    method.amname                                   AS method,
    coalesce(named.reloptions, '{}')                AS options,
    index.indisvalid AND index.indisready           AS valid,
    pg_get_expr(index.indpred, index.indrelid)      AS predicate,
    pg_relation_size(named.oid)                     AS bytes
FROM pg_index AS index
JOIN pg_class AS named ON named.oid = index.indexrelid
JOIN pg_am AS method ON method.oid = named.relam
WHERE index.indrelid = to_regclass(format('embeddings.%%I', %(table)s::text))
  AND method.amname IN ('hnsw', 'ivfflat')
ORDER BY named.relname


-- name: session
-- What a build needs of its session. Without lock_timeout, which would leave an invalid index; with a deadline of its own,
-- whatever the role has. Parameters: milliseconds; memory (kilobytes, and not less than the server gives anyway).

SELECT
    set_config('lock_timeout', '0', false),
    set_config('statement_timeout', %(milliseconds)s::text, false),
    set_config(
        'maintenance_work_mem',
        greatest(%(memory)s, (SELECT setting::bigint FROM pg_settings WHERE name = 'maintenance_work_mem'))::text,
        false
    )


-- name: waits_for
-- The transaction that a concurrent index build waits for. Parameters: pid, of the session that builds, and seconds: a
-- transaction that has been open for less ends by itself, as those of the program itself do, and is not worth a word.
-- Of another role's sessions neither the age nor the state may be seen; those are always said.

SELECT blocker.pid, coalesce(nullif(blocker.application_name, ''), blocker.usename, 'unknown'),
       coalesce(extract(epoch FROM clock_timestamp() - blocker.xact_start)::bigint || ' s', 'an unknown time')
FROM pg_stat_progress_create_index AS progress
JOIN pg_stat_activity AS blocker ON blocker.pid = progress.current_locker_pid
WHERE progress.pid = %(pid)s AND progress.phase LIKE 'waiting%%'
  AND coalesce(clock_timestamp() - blocker.xact_start >= make_interval(secs => %(seconds)s), blocker.state IS NULL)
