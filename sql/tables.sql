-- Tables and views that a collection may name, as `source.table:` writes them.

SELECT CASE WHEN pg_table_is_visible(pg_class.oid) THEN relname ELSE nspname || '.' || relname END
FROM pg_class
JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE relkind IN ('r', 'v', 'm', 'f', 'p') AND nspname NOT IN ('pg_catalog', 'information_schema', 'embeddings')
  AND nspname NOT LIKE 'pg\_%'
