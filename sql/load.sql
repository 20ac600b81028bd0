-- A file becomes a table. {table}, {columns} (names and types), {names}, {key}: of the table; {loaded}: its columns of the
-- file's rows; {values}, {new}: of the row that is inserted; {old}: of the row that is there.


-- name: bad_key
-- A key that is NULL, or that several rows of the file have.

SELECT {key} FROM load_row GROUP BY {key} HAVING count(*) > 1 OR num_nulls({key}) > 0 LIMIT 1


-- name: stage
CREATE TEMPORARY TABLE load_row ON COMMIT DROP AS SELECT {names} FROM {table} LIMIT 0


-- name: table
-- A source table with a key and an `updated_at` that tells the truth: a stand-in for the user's own. A table that is
-- there already is the user's, and gets neither.

CREATE TABLE {table} ({columns}, updated_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY ({key}));

CREATE OR REPLACE FUNCTION embeddings.touch_updated_at() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.updated_at := clock_timestamp();
    RETURN NEW;
END $$;

CREATE TRIGGER touch_updated_at BEFORE UPDATE ON {table}
FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*) EXECUTE FUNCTION embeddings.touch_updated_at();


-- name: upsert
-- Rows that are as they were are not written, and keep their `updated_at`.

WITH written AS (
    INSERT INTO {table} AS loaded ({names})
    SELECT {loaded} FROM load_row
    ON CONFLICT ({key}) DO UPDATE SET ({names}) = ROW ({values})
    WHERE ROW ({old}) IS DISTINCT FROM ROW ({new})
    RETURNING xmax = 0 AS inserted
)
SELECT count(*) FILTER (WHERE inserted), count(*) FILTER (WHERE NOT inserted) FROM written
