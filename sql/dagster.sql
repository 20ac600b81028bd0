-- Dagster's own tables, in the database beside the pipeline's. Their form is dagster-postgres's: look here, too, before
-- the pin on Dagster is raised. No placeholders, unless parameters are named.


-- name: newest
-- The runs that say how things are: those with the newest materialization of an asset, or of one partition of it, and
-- with the newest result of a check. Without them the UI would call the partition missing.

SELECT DISTINCT run_id
FROM event_logs
WHERE id IN (
    SELECT max(id) FROM event_logs
    WHERE dagster_event_type = 'ASSET_MATERIALIZATION' AND asset_key IS NOT NULL
    GROUP BY asset_key, partition
)
UNION
SELECT run_id
FROM asset_check_executions
WHERE id IN (SELECT max(id) FROM asset_check_executions GROUP BY asset_key, check_name, partition)


-- name: at_rest
-- Whether Dagster need not be told anything of a collection that has no work: no run says that it is under way, each batch
-- has its partition, and it was shown lately that the source was read.
-- Parameters: asset, partitions (the name of the set), keys (of the batches), every.

SELECT NOT EXISTS (SELECT FROM runs WHERE status IN ('NOT_STARTED', 'STARTING', 'STARTED', 'CANCELING'))
   AND NOT EXISTS (
       SELECT unnest(%(keys)s::text[])
       EXCEPT SELECT partition FROM dynamic_partitions WHERE partitions_def_name = %(partitions)s)
   AND EXISTS (
       SELECT FROM asset_keys
       WHERE asset_key = %(asset)s AND last_materialization_timestamp > coalesce(wipe_timestamp, '-infinity')
         AND now() - last_materialization_timestamp AT TIME ZONE 'UTC' BETWEEN '0' AND %(every)s::interval)


-- name: make_room
-- What was deleted is room for what comes, at once and not when autovacuum comes by.

VACUUM (SKIP_LOCKED) event_logs, runs, run_tags, asset_check_executions


-- name: forget_checks
-- Dagster leaves the results of checks there when their run is deleted.

DELETE FROM asset_check_executions
WHERE run_id IS NOT NULL AND NOT EXISTS (SELECT FROM runs WHERE runs.run_id = asset_check_executions.run_id)
  AND id NOT IN (SELECT max(id) FROM asset_check_executions GROUP BY asset_key, check_name, partition)


-- name: schemas
-- Whether Dagster's tables are, or can be made, in the first schema of the search path, and whether in public. The
-- path may name pg_catalog or pg_temp first.

SELECT coalesce(current_schema !~ '^pg_' AND (has_schema_privilege(current_schema, 'CREATE') OR EXISTS (
           SELECT FROM pg_class
           WHERE relname = 'instigators' AND relnamespace = to_regnamespace(quote_ident(current_schema)))), false),
       coalesce(has_schema_privilege(to_regnamespace('public'), 'CREATE'), false) OR EXISTS (
           SELECT FROM pg_class WHERE relname = 'instigators' AND relnamespace = to_regnamespace('public'))


-- name: partitions_standing
-- What tells one state of a set of dynamic partitions from another. Parameter: name.

SELECT count(*), coalesce(max(id), 0), coalesce(sum(id), 0)::bigint FROM dynamic_partitions WHERE partitions_def_name = %(name)s
