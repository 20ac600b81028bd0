-- A file becomes a table. {table}, {columns} (names and types), {names}, {key}: of the table; {row}: the number of a row
-- in the file, counted without the header; {loaded}: the table's columns of the file's rows; {values}, {new}: of the row
-- that is inserted; {old}: of the row that is there. {column}, {type}: one of a file's columns, and a type for it;
-- {files}: the comment that names the files that were loaded. Parameter: table.


-- name: bad_key
-- A key that is NULL, or that several rows of the file have, and the first of those rows.

SELECT min({row}), {key} FROM load_row GROUP BY {key} HAVING count(*) > 1 OR num_nulls({key}) > 0
ORDER BY 1 LIMIT 1


-- name: columns
-- The columns of the table, and the types they have; of a domain, the type beneath it. No row: no such table.

SELECT attname, format_type(atttypid, atttypmod), format_type(coalesce(nullif(typbasetype, 0), atttypid), NULL)
FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
WHERE attrelid = to_regclass(%(table)s) AND attnum > 0 AND NOT attisdropped
ORDER BY attnum


-- name: delete
DELETE FROM {table}


-- name: note_files
COMMENT ON TABLE {table} IS {files}


-- name: rendered
-- Whether each value of a column, read as the type and rendered again, is the text of the file.

SELECT NOT EXISTS (SELECT FROM load_text WHERE {column}::{type}::text IS DISTINCT FROM {column})


-- name: rows
-- A column as the table has it, in the order of the file.

SELECT {column}::text FROM load_row ORDER BY {row}


-- name: stage
CREATE TEMPORARY TABLE load_row ON COMMIT DROP AS SELECT 0::bigint AS {row}, {names} FROM {table} LIMIT 0


-- name: stage_text
CREATE TEMPORARY TABLE load_text ({columns}) ON COMMIT DROP


-- name: stage_type
CREATE TEMPORARY TABLE load_type ON COMMIT DROP AS SELECT CAST(NULL AS {type}) AS value


-- name: state
-- The table's schema and name; whether `load` has made it, whether this role may comment on it, and its comment, which
-- names the files that were loaded. No row: no such table.

SELECT
    nspname,
    relname,
    EXISTS (
        SELECT FROM pg_trigger WHERE tgrelid = pg_class.oid AND tgname = 'touch_updated_at'
        AND tgfoid = to_regproc('embeddings.touch_updated_at')
    ),
    pg_has_role(relowner, 'USAGE'),
    obj_description(pg_class.oid, 'pg_class')
FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE pg_class.oid = to_regclass(%(table)s)


-- name: table
-- A source table with a key and an `updated_at` that tells the truth: a stand-in for the user's own. A table that is
-- there already is the user's, and gets neither. Rows are compared by their bytes: 1.10 is not 1.1.

CREATE TABLE {table} ({columns}, updated_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY ({key}));

CREATE OR REPLACE FUNCTION embeddings.touch_updated_at() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.updated_at := clock_timestamp();
    RETURN NEW;
END $$;

CREATE TRIGGER touch_updated_at BEFORE UPDATE ON {table}
FOR EACH ROW WHEN (OLD.* *<> NEW.*) EXECUTE FUNCTION embeddings.touch_updated_at();


-- name: type
SELECT format_type(atttypid, atttypmod) FROM pg_attribute
WHERE attrelid = 'pg_temp.load_type'::regclass AND attname = 'value'


-- name: unstage_text
DROP TABLE pg_temp.load_text


-- name: upsert
-- Rows that are as they were are not written, and keep their `updated_at`.

WITH written AS (
    INSERT INTO {table} AS loaded ({names})
    SELECT {loaded} FROM load_row
    ON CONFLICT ({key}) DO UPDATE SET ({names}) = ROW ({values})
    WHERE record_image_ne(ROW ({old}), ROW ({new}))
    RETURNING xmax = 0 AS inserted
)
SELECT count(*) FILTER (WHERE inserted), count(*) FILTER (WHERE NOT inserted) FROM written
