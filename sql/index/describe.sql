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
