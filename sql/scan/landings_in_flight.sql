-- The batches of the collection that a landing is working on now: their advisory locks are held.
-- Parameter: lock_class.

SELECT objid::bigint
FROM pg_locks
WHERE locktype = 'advisory' AND objsubid = 2 AND granted
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND classid = (%(lock_class)s::bigint & 4294967295)::oid;
