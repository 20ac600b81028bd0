-- The indexes on a column of the user's table and nothing else, with what makes another like them.
-- Parameters: table, column.

SELECT
    schema.nspname                                      AS schema,
    named.relname                                       AS name,
    method.amname                                       AS method,
    operators.opcname                                   AS operator_class,
    coalesce(named.reloptions, '{}')                    AS options,
    index.indisvalid AND index.indisready               AS valid,
    pg_relation_size(named.oid)                         AS bytes
FROM pg_index AS index
JOIN pg_class AS named ON named.oid = index.indexrelid
JOIN pg_namespace AS schema ON schema.oid = named.relnamespace
JOIN pg_am AS method ON method.oid = named.relam
JOIN pg_attribute AS attribute ON attribute.attrelid = index.indrelid AND attribute.attname = %(column)s
JOIN pg_opclass AS operators ON operators.oid = index.indclass[0]
WHERE index.indrelid = to_regclass(%(table)s) AND index.indkey[0] = attribute.attnum AND index.indnatts = 1
  AND method.amname IN ('hnsw', 'ivfflat')
ORDER BY named.relname
