-- Building ANN indexes.


-- name: session
-- What a build needs of its session. Without lock_timeout, which would leave an invalid index; with a deadline of its
-- own, whatever the role has. Parameters: milliseconds; memory (kilobytes, and
-- not less than the server gives anyway).

SELECT
    set_config('lock_timeout', '0', false),
    set_config('statement_timeout', %(milliseconds)s::text, false),
    set_config(
        'maintenance_work_mem',
        greatest(%(memory)s, (SELECT setting::bigint FROM pg_settings WHERE name = 'maintenance_work_mem'))::text,
        false
    )


-- name: removal
-- What the removal of an index that is not valid needs: an end, if it has to wait for others. Parameter: milliseconds.

SELECT set_config('lock_timeout', '0', false), set_config('statement_timeout', %(milliseconds)s::text, false)


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


-- name: progress
-- How many vectors of a collection's index that is being built are in it, and how many there are; of our own model tables.
-- Parameter: collection.

SELECT
    CASE WHEN progress.blocks_total > 0
         THEN round(progress.blocks_done::numeric / progress.blocks_total * greatest(class.reltuples, 0))
         ELSE 0 END::bigint,
    greatest(class.reltuples, 0)::bigint
FROM pg_stat_progress_create_index AS progress
JOIN pg_class AS class ON class.oid = progress.relid AND class.relnamespace = to_regnamespace('embeddings')
WHERE progress.datname = current_database()
  AND class.relname ~ ('^' || %(collection)s::text || '_vector_[0-9a-f]+$')
ORDER BY progress.pid
LIMIT 1


-- name: filters
-- The indexes of a collection's filters, and whether each is valid. Parameter: collection.

SELECT named.relname, index.indisvalid AND index.indisready
FROM pg_index AS index
JOIN pg_class AS named ON named.oid = index.indexrelid
WHERE index.indrelid = to_regclass(format('embeddings.%%I', %(collection)s::text || '_item'))
  AND starts_with(named.relname, %(collection)s::text || '_filter_')
