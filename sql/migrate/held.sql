-- How many transactions older than 40 ms hold a lock on these relations: a lock that excludes them would wait for them,
-- and all others for it. What another role's began at may be hidden: it counts as old. An autovacuum gives way by itself.
-- Parameter: relations.

SELECT count(*)
FROM pg_locks
JOIN pg_stat_activity AS activity USING (pid)
WHERE pg_locks.relation = ANY (%(relations)s::regclass[]) AND pg_locks.granted AND pg_locks.pid <> pg_backend_pid()
  AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND activity.backend_type IS DISTINCT FROM 'autovacuum worker'
  AND coalesce(activity.xact_start < clock_timestamp() - interval '40 milliseconds', true)
