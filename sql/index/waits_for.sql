-- The transaction that a concurrent index build waits for. Parameter: pid, of the session that builds.

SELECT blocker.pid, coalesce(nullif(blocker.application_name, ''), blocker.usename, 'unknown'),
       coalesce(extract(epoch FROM now() - blocker.xact_start), 0)::bigint
FROM pg_stat_progress_create_index AS progress
JOIN pg_stat_activity AS blocker ON blocker.pid = progress.current_locker_pid
WHERE progress.pid = %(pid)s AND progress.phase LIKE 'waiting%%'
