-- How many transactions of some age hold a lock on these relations: a lock that excludes them would wait for them,
-- and all others for it. What another role's began at may be hidden: it counts as old. Also, how many autovacuums do: they
-- give way, after deadlock_timeout.
-- Parameters: relations, milliseconds.

SELECT
    count(*) FILTER (
        WHERE activity.backend_type IS DISTINCT FROM 'autovacuum worker'
          AND coalesce(activity.xact_start < clock_timestamp() - %(milliseconds)s * interval '1 millisecond', true)),
    count(*) FILTER (WHERE activity.backend_type = 'autovacuum worker')
FROM pg_locks
JOIN pg_stat_activity AS activity USING (pid)
WHERE pg_locks.relation = ANY (%(relations)s::regclass[]) AND pg_locks.granted AND pg_locks.pid <> pg_backend_pid()
  AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
