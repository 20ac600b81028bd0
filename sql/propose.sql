-- What a table looks like, for a proposal of its collection. No placeholders.


-- name: describe_table
-- The columns of a table or view in their order, a domain's with the type that it is made of; key_position counts from
-- 1 within the primary key, else within a unique index on columns that cannot be NULL. Parameter: table.

WITH key AS (
    SELECT indkey, indnkeyatts
    FROM pg_index
    WHERE indrelid = %(table)s::regclass AND indisunique AND indisvalid AND indpred IS NULL AND indexprs IS NULL
      AND (indisprimary OR NOT EXISTS (
          SELECT FROM pg_attribute
          WHERE attrelid = indrelid AND attnum = ANY (indkey::int[]) AND NOT attnotnull))
    ORDER BY indisprimary DESC, indnkeyatts, indexrelid
    LIMIT 1
), part AS (
    SELECT number, position FROM key, unnest(indkey::int[]) WITH ORDINALITY AS part (number, position)
    WHERE position <= indnkeyatts
)
SELECT attname AS name, format_type(coalesce(nullif(typbasetype, 0), atttypid), NULL) AS type, position AS key_position
FROM pg_attribute
JOIN pg_type ON pg_type.oid = atttypid
LEFT JOIN part ON number = attnum
WHERE attrelid = %(table)s::regclass AND attnum > 0 AND NOT attisdropped
ORDER BY attnum


-- name: removed_states
-- Which values of a status column say that a row is gone. {table}, {column}; {rows}: of the sample. Parameter: states.

SELECT DISTINCT {column}::text
FROM (SELECT {column} FROM {table} LIMIT {rows}) AS sample
WHERE lower({column}::text) = ANY (%(states)s)
ORDER BY 1
