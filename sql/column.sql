-- A destination that is a column of the user's own table.
--
-- {destination}, {column}   the user's table, and its column
-- {type}, {norm}            halfvec(n) or vector(n), and pgvector's function for a length
-- {vector_name}, {collection}, {fingerprint}   literals
-- {keys}                    key_1, key_2 …, the key's columns in the companion table {hash}; {hash_keys}, {typed_keys}: of
--                           its aliases; {key_columns}: made from the user's; {first_key}: the first of the user's
-- {key_json}                makes a row of {hash} of an item key
-- {same_row}                destination and hash have the same key; {same_as_typed}: destination and typed
-- {primary_key}, {key_index}, {index}, {method}, {operator_class}, {parameters}   of indexes
-- {made}                    the statement that selects what is written: `committed`, `backfilled` or `backfilled_layer`
-- {layer}, {on_commit}, {setting}, {change}      of a backfill: see there
-- {previous}                the previous model's column
-- {adopt}, {replaced}, {item_keys}, {row_hashes}   literals


-- name: add_column
-- No row is rewritten.

ALTER TABLE {destination} ADD COLUMN IF NOT EXISTS {column} {type}


-- name: backfilled
-- Of a batch that is backfilled: vectors of its live texts.

SELECT text.id AS text_id, text.item_key, text.content_hash, staged.embedding, false AS keeps
FROM backfill_vector AS staged
JOIN {text} AS text ON text.id = staged.text_id AND text.content_hash = staged.content_hash


-- name: backfilled_layer
-- Of a layer: the vectors of its live texts, which stay until the transaction ends.

SELECT text.id AS text_id, text.item_key, text.content_hash, staged.embedding, false AS keeps
FROM backfill_layer AS layered
JOIN backfill_vector AS staged USING (text_id)
JOIN {text} AS text ON text.id = staged.text_id AND text.content_hash = staged.content_hash
WHERE layered.layer = {layer}
FOR KEY SHARE OF text


-- name: adoptable
-- Which of these items have a vector that would be taken, if they were committed as they are.

SELECT made.item_key
FROM unnest({item_keys}::text[]) AS made (item_key)
LEFT JOIN {item} AS item USING (item_key),
     jsonb_populate_record(NULL::{hash}, {key_json}) AS typed
JOIN {destination} AS destination ON {same_as_typed}
WHERE {norm}(destination.{column}) > 0 AND item.committed_hash IS NULL


-- name: adoptable_at_first
-- The same before the collection has tables of ours. {own_key_json} makes a row of {destination} of an item key;
-- {same_row_as_typed}: destination and that row have the same key.

SELECT made.item_key
FROM unnest({item_keys}::text[]) AS made (item_key), jsonb_populate_record(NULL::{destination}, {own_key_json}) AS typed
JOIN {destination} AS destination ON {same_row_as_typed}
WHERE {norm}(destination.{column}) > 0


-- name: adopted
-- Vectors that are there already of items that are never committed, and are as they were first seen. number: the item's
-- place among its keys, from 1.

SELECT made.number AS number, destination.{column} AS embedding
FROM unnest({item_keys}::text[], {row_hashes}::bytea[]) WITH ORDINALITY AS made (item_key, row_hash, number)
JOIN {item} AS item ON item.item_key = made.item_key AND item.committed_hash IS NULL
                 AND item.seen_hash = made.row_hash AND item.as_first_seen,
     jsonb_populate_record(NULL::{hash}, {key_json}) AS typed
JOIN {destination} AS destination ON {same_as_typed}
WHERE {norm}(destination.{column}) > 0 AND NOT EXISTS (SELECT FROM {hash} AS hash WHERE {same_row})
ORDER BY number


-- name: column
-- The name that a model's column has now: its view follows it through every rename. Parameters: view, table.

SELECT DISTINCT attribute.attname
FROM pg_rewrite AS rule
JOIN pg_depend AS depends ON depends.classid = 'pg_rewrite'::regclass AND depends.objid = rule.oid
JOIN pg_attribute AS attribute
  ON attribute.attrelid = depends.refobjid AND attribute.attnum = depends.refobjsubid
JOIN pg_type AS type ON type.oid = attribute.atttypid
WHERE rule.ev_class = to_regclass(%(view)s) AND depends.refclassid = 'pg_class'::regclass
  AND depends.refobjid = to_regclass(%(table)s) AND type.typname IN ('vector', 'halfvec')


-- name: committed
-- Of a commit: the vectors of live texts. keeps: a vector that its row has already is not written over, since the row is
-- as it was when it was first seen, and the vector is the declared profile's.

SELECT text.id AS text_id, text.item_key, text.content_hash, staged.embedding,
       {adopt} AND NOT staged.encoded AND decided.committed_hash IS NULL AND item.seen_hash = decided.encoded_hash
         AND item.as_first_seen AS keeps
FROM commit_vector AS staged
JOIN {text} AS text ON text.id = staged.text_id
JOIN commit_decision AS decided ON decided.item_key = text.item_key
JOIN {item} AS item ON item.item_key = text.item_key


-- name: create_hash
-- Beside the column: whose text each vector was made from.

CREATE TABLE IF NOT EXISTS {hash} AS
SELECT 0::bigint AS text_id, ''::bytea AS content_hash, {key_columns} FROM {destination} AS destination WITH NO DATA


-- name: create_primary_key
-- In a publication FOR ALL TABLES nothing can be updated or deleted in a table without one. ADD knows no IF NOT EXISTS.
-- {hash_name}: the table's name, as a text.

DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_index WHERE indrelid = {hash_name}::regclass AND indisprimary) THEN
        ALTER TABLE {hash} ADD CONSTRAINT {primary_key} PRIMARY KEY (text_id);
    END IF;
END $$


-- name: create_key_index
CREATE UNIQUE INDEX IF NOT EXISTS {key_index} ON {hash} ({keys})


-- name: create_vector
-- Shows the column as a model table. As any view, it follows the column when that is renamed.

CREATE OR REPLACE VIEW {vector} AS
SELECT hash.text_id, {vector_name}::text COLLATE "C" AS vector_name, hash.content_hash, destination.{column} AS embedding
FROM {hash} AS hash
JOIN {destination} AS destination ON {same_row}
WHERE destination.{column} IS NOT NULL


-- name: create_written
-- Which texts need no vector any more: a row that was deleted since needs none either, until its text goes too.

CREATE OR REPLACE VIEW {written} AS
SELECT hash.text_id, hash.content_hash
FROM {hash} AS hash
LEFT JOIN {destination} AS destination ON {same_row}
WHERE destination.{column} IS NOT NULL OR destination.{first_key} IS NULL


-- name: create_index
CREATE INDEX CONCURRENTLY {index} ON {destination} USING {method} ({column} {operator_class}) {parameters}


-- name: delete
-- A row whose text went, or became another, loses its vector, but for one that this commit writes anyway.
-- {coming}: the item keys of those.

WITH forgotten AS (
    DELETE FROM {hash} AS hash USING commit_gone AS gone WHERE hash.text_id = gone.id RETURNING {hash_keys}
), coming AS MATERIALIZED (
    SELECT {typed_keys}
    FROM unnest({coming}::text[]) AS made (item_key), jsonb_populate_record(NULL::{hash}, {key_json}) AS typed
), emptied AS (
    UPDATE {destination} AS destination SET {column} = NULL
    FROM forgotten AS hash
    WHERE {same_row} AND destination.{column} IS NOT NULL AND ({hash_keys}) NOT IN (SELECT {keys} FROM coming)
)
SELECT count(*) FROM forgotten


-- name: dependants
-- What would go on following a column when it is renamed: views, rules, functions, generated columns, constraints,
-- publications, indexes of other kinds or on expressions. ANN indexes are renamed with it. Parameters: table, column, ours (views).

SELECT DISTINCT pg_describe_object(depends.classid, depends.objid, depends.objsubid)
FROM pg_attribute AS attribute
JOIN pg_depend AS depends
  ON depends.refclassid = 'pg_class'::regclass AND depends.refobjid = attribute.attrelid
 AND depends.refobjsubid = attribute.attnum
LEFT JOIN pg_rewrite AS rule ON depends.classid = 'pg_rewrite'::regclass AND rule.oid = depends.objid
LEFT JOIN pg_index AS index ON depends.classid = 'pg_class'::regclass AND index.indexrelid = depends.objid
LEFT JOIN pg_class AS named ON named.oid = index.indexrelid
LEFT JOIN pg_am AS method ON method.oid = named.relam
WHERE attribute.attrelid = to_regclass(%(table)s) AND attribute.attname = %(column)s
  AND NOT coalesce(rule.ev_class IN (SELECT to_regclass(name) FROM unnest(%(ours)s::text[]) AS name), false)
  AND NOT coalesce(method.amname IN ('hnsw', 'ivfflat') AND index.indexprs IS NULL
                   AND (index.indpred IS NULL
                        OR pg_get_expr(index.indpred, index.indrelid) = format('(%%I IS NOT NULL)', attname)), false)
ORDER BY 1


-- name: drop_column
ALTER TABLE {destination} DROP COLUMN IF EXISTS {column}


-- name: indexes
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


-- name: is_relation
-- Parameters: table, name.

SELECT FROM pg_class AS named JOIN pg_class AS destination USING (relnamespace)
WHERE destination.oid = to_regclass(%(table)s) AND named.relname = %(name)s


-- name: layers
-- In which order many rows are written: a layer takes about one row of each page, so that the next layer finds the room
-- of that row's old version free again. So most updates stay in their page, and no index gets a new entry.
-- A row's place in the table is its ctid, (page,line).

CREATE TEMPORARY TABLE backfill_layer AS
WITH placed AS MATERIALIZED (
    SELECT staged.text_id, destination.ctid AS place, (destination.ctid::text::point)[0]::bigint AS page
    FROM backfill_vector AS staged
    JOIN {text} AS made ON made.id = staged.text_id,
         jsonb_populate_record(NULL::{hash}, {key_json}) AS typed
    JOIN {destination} AS destination ON {same_as_typed}
), numbered AS (
    SELECT text_id, place, row_number() OVER (PARTITION BY page ORDER BY place) AS number_in_page FROM placed
), size AS (
    SELECT greatest(200, least(1000, count(DISTINCT page))) AS rows FROM placed
)
SELECT text_id, (row_number() OVER (ORDER BY number_in_page, place) - 1) / size.rows AS layer FROM numbered, size


-- name: layer_index
CREATE INDEX ON backfill_layer (layer)


-- name: lock
LOCK TABLE {destination} IN ROW EXCLUSIVE MODE


-- name: look
-- A column that vectors are to be kept in, as it is. No row: no such table. Parameters: table, column, keys.

SELECT
    class.relkind = 'r' AND NOT class.relispartition
      AND NOT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = class.oid) AS is_table,
    pg_has_role(class.relowner, 'USAGE')                                  AS is_owner,
    has_table_privilege(class.oid, 'SELECT') AND has_table_privilege(class.oid, 'UPDATE') AS may_write,
    row_security_active(class.oid)                                        AS hides_rows,
    type.typname                                                          AS type,
    attribute.atttypmod                                                   AS dimension,
    attribute.attnotnull                                                  AS not_null,
    attribute.attgenerated <> ''                                          AS generated,
    EXISTS (
        SELECT FROM pg_index
        WHERE indrelid = class.oid AND indisunique AND indisvalid AND indpred IS NULL AND indexprs IS NULL
          AND (SELECT array_agg(attname::text ORDER BY attname::text COLLATE "C")
               FROM pg_attribute WHERE attrelid = class.oid AND attnum = ANY ((indkey::smallint[])[0:indnkeyatts - 1]))
            = (SELECT array_agg(name ORDER BY name COLLATE "C") FROM unnest(%(keys)s::text[]) AS name)
    )                                                                     AS key_is_unique
FROM pg_class AS class
LEFT JOIN pg_attribute AS attribute
  ON attribute.attrelid = class.oid AND attribute.attname = %(column)s AND attribute.attnum > 0 AND NOT attisdropped
LEFT JOIN pg_type AS type ON type.oid = attribute.atttypid
WHERE class.oid = to_regclass(%(table)s)


-- name: lost
-- Rows that have a vector of the previous model alone. {previous}, {column}: the previous and the current column.

SELECT count(*) FROM {destination} WHERE {previous} IS NOT NULL AND {column} IS NULL


-- name: made_for
-- What the views were made for, and whether they are there. Parameters: collection, fingerprint, vector, written, hash.

SELECT identity, to_regclass(%(vector)s), to_regclass(%(written)s), to_regclass(%(hash)s)
FROM embeddings.model
WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s


-- name: note_setting
-- What `toast_tuple_target` of the user's table was before a backfill changed it; NULL: nothing is to be changed back.

UPDATE embeddings.model SET toast_tuple_target = {setting}
WHERE collection = {collection} AND fingerprint = {fingerprint}


-- name: change_setting
ALTER TABLE {destination} {change}


-- name: schema
-- Parameter: table.

SELECT nspname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = to_regclass(%(table)s)


-- name: drop_written
DROP VIEW IF EXISTS {written}


-- name: drop_vector
DROP VIEW IF EXISTS {vector}


-- name: drop_hash
DROP TABLE IF EXISTS {hash}


-- name: stage_backfill
-- Vectors on their way into a column: see store/destination/column_write.py.

CREATE TEMPORARY TABLE backfill_vector (
    text_id bigint PRIMARY KEY, vector_name text NOT NULL, content_hash bytea NOT NULL, embedding {type} NOT NULL
) ON COMMIT {on_commit}


-- name: stage_commit
-- Vectors of one commit, on their way into a column.

CREATE TEMPORARY TABLE commit_vector (
    text_id bigint NOT NULL, content_hash bytea NOT NULL, encoded boolean NOT NULL, embedding {type} NOT NULL
) ON COMMIT DROP


-- name: unstage_backfill
DROP TABLE IF EXISTS backfill_vector, backfill_layer


-- name: write
-- Vectors into the user's rows, and into the companion table whose text each was made from. A row that has the very
-- vector, as one that was there before, is not written. made: text_id, item_key, content_hash, embedding, keeps.

WITH put AS MATERIALIZED (
    SELECT made.text_id, made.content_hash, made.embedding, made.keeps, {typed_keys}
    FROM ({made}) AS made, jsonb_populate_record(NULL::{hash}, {key_json}) AS typed
), changed AS (
    UPDATE {destination} AS destination SET {column} = hash.embedding
    FROM put AS hash
    WHERE {same_row} AND destination.{column} IS DISTINCT FROM hash.embedding
      AND NOT (hash.keeps AND coalesce({norm}(destination.{column}) > 0, false))
    RETURNING hash.text_id
), noted AS (
    INSERT INTO {hash} AS hash (text_id, content_hash, {keys})
    SELECT text_id, content_hash, {keys} FROM put
    ON CONFLICT (text_id) DO UPDATE SET content_hash = excluded.content_hash
    WHERE hash.content_hash <> excluded.content_hash
    RETURNING text_id
)
SELECT count(*) FROM changed FULL JOIN noted USING (text_id)
