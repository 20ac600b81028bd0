-- Who holds which locks. No placeholders.


-- name: holders
-- How many transactions of some age hold a lock on these relations: a lock that excludes them would wait for them,
-- and all others for it. Also, how many autovacuums do: they give way, after deadlock_timeout; of how many sessions,
-- since they are another role's, neither kind nor age may be seen (they count as old, or, with young_unseen, as young);
-- and how many of these may be autovacuums.
-- Parameters: relations, milliseconds, young_unseen.

SELECT
    count(*) FILTER (
        WHERE activity.backend_type IS DISTINCT FROM 'autovacuum worker'
          AND coalesce(activity.xact_start < clock_timestamp() - %(milliseconds)s * interval '1 millisecond',
                       NOT %(young_unseen)s)),
    count(*) FILTER (WHERE activity.backend_type = 'autovacuum worker'),
    count(*) FILTER (WHERE activity.backend_type IS NULL),
    count(*) FILTER (WHERE activity.backend_type IS NULL AND pg_locks.mode = 'ShareUpdateExclusiveLock')
FROM pg_locks
JOIN pg_stat_activity AS activity USING (pid)
WHERE pg_locks.relation = ANY (%(relations)s::regclass[]) AND pg_locks.granted AND pg_locks.pid <> pg_backend_pid()
  AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())


-- name: held_batches
-- The batches of the collection that a commit is working on now: their advisory locks are held.
-- Parameter: lock_class.

SELECT objid::bigint
FROM pg_locks
WHERE locktype = 'advisory' AND objsubid = 2 AND granted
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND classid = (%(lock_class)s::bigint & 4294967295)::oid;
