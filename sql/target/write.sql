-- Vectors into the user's rows, and into the companion table whose text each was made from. A row that has the very
-- vector, as one that was there before, is not written. made: text_id, item_key, content_hash, embedding, keeps.

WITH put AS MATERIALIZED (
    SELECT made.text_id, made.content_hash, made.embedding, made.keeps, {typed_keys}
    FROM ({made}) AS made, jsonb_populate_record(NULL::{hash}, {key_json}) AS typed
), changed AS (
    UPDATE {target} AS target SET {column} = hash.embedding
    FROM put AS hash
    WHERE {same_row} AND target.{column} IS DISTINCT FROM hash.embedding
      AND NOT (hash.keeps AND coalesce({norm}(target.{column}) > 0, false))
    RETURNING hash.text_id
), noted AS (
    INSERT INTO {hash} AS hash (text_id, content_hash, {keys})
    SELECT text_id, content_hash, {keys} FROM put
    ON CONFLICT (text_id) DO UPDATE SET content_hash = excluded.content_hash
    WHERE hash.content_hash <> excluded.content_hash
    RETURNING text_id
)
SELECT count(*) FROM changed FULL JOIN noted USING (text_id)
