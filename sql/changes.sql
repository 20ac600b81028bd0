-- What may be followed of a source by logical replication. Only ever read: a slot is temporary, and ends with its session.
-- {table}: the user's table, as a text literal.


-- name: possible
-- What stands in the way, if anything does: wal_level, whether the role may replicate, the kind of relation, whether each
-- key column is in what the log says of a deleted row; and a publication of the whole table that tells of every change.
-- Parameter: key (columns).

SELECT
    current_setting('wal_level'),
    EXISTS (SELECT FROM pg_roles WHERE rolname = current_user AND (rolsuper OR rolreplication)),
    class.relkind::text,
    CASE class.relreplident
        WHEN 'f' THEN true
        WHEN 'n' THEN false
        ELSE coalesce((
            SELECT array_agg(attribute.attname::text) @> %(key)s::text[]
            FROM pg_index
            JOIN pg_attribute AS attribute ON attribute.attrelid = class.oid AND attribute.attnum = ANY (pg_index.indkey)
            WHERE pg_index.indrelid = class.oid
              AND CASE class.relreplident WHEN 'i' THEN pg_index.indisreplident ELSE pg_index.indisprimary END), false)
    END,
    (SELECT publication.pubname::text
     FROM pg_publication AS publication
     CROSS JOIN LATERAL (
         SELECT array_agg(format('%%I.%%I', schemaname, tablename)::regclass::oid)
         FROM pg_publication_tables AS published
         WHERE published.pubname = publication.pubname
           AND to_jsonb(published) ->> 'rowfilter' IS NULL  -- newer servers have these two
           AND coalesce(to_jsonb(published) -> 'attnames' @> to_jsonb(%(key)s::text[]), true)
     ) AS published (tables)
     WHERE publication.pubinsert AND publication.pubupdate AND publication.pubdelete AND publication.pubtruncate
       AND (class.oid = ANY (published.tables)
            OR class.relkind = 'p' AND NOT EXISTS (
                SELECT FROM pg_partition_tree(class.oid) WHERE isleaf AND relid <> ALL (published.tables)))
     ORDER BY publication.puballtables, publication.pubname
     LIMIT 1)
FROM pg_class AS class
WHERE class.oid = to_regclass({table})


-- name: partitions
-- The relations of whose rows the log speaks: the table, and its partitions.

SELECT to_regclass({table})::oid
UNION
SELECT relid::oid FROM pg_partition_tree(to_regclass({table}))
