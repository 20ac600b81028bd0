-- The columns of a table or view in their order; key_position counts from 1 within the primary key, else within a
-- unique index on columns that cannot be NULL. Parameter: table.

WITH key AS (
    SELECT indkey::int[] AS columns
    FROM pg_index
    WHERE indrelid = %(table)s::regclass AND indisunique AND indisvalid AND indpred IS NULL AND indexprs IS NULL
      AND (indisprimary OR NOT EXISTS (
          SELECT FROM pg_attribute
          WHERE attrelid = indrelid AND attnum = ANY (indkey::int[]) AND NOT attnotnull))
    ORDER BY indisprimary DESC, indnkeyatts, indexrelid
    LIMIT 1
)
SELECT attname AS name, format_type(atttypid, NULL) AS type,
       array_position((SELECT columns FROM key), attnum::int) AS key_position
FROM pg_attribute
WHERE attrelid = %(table)s::regclass AND attnum > 0 AND NOT attisdropped
ORDER BY attnum
