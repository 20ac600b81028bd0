-- What a FAISS index is of. {vector_name}, {type}, {joined}, {matching}: as in sql/search.sql.


-- name: version
-- The content that a collection's current model table has. Parameter: collection.

SELECT collection.fingerprint, identity.id::text, collection.epoch::text, collection.version, collection.stamp::text
FROM embeddings.collection, embeddings.database_identity AS identity
WHERE collection.name = %(collection)s


-- name: was
-- Whether a collection once had this stamp. Parameters: collection, version, stamp.

SELECT EXISTS (
    SELECT FROM embeddings.collection_stamp
    WHERE collection = %(collection)s AND version = %(version)s AND stamp::text = %(stamp)s)


-- name: newest_text
SELECT coalesce(max(id), 0) FROM {text}


-- name: lacking
-- The texts up to an id that have no vector. Parameter: newest.

SELECT text_id FROM {lacking} WHERE text_id <= %(newest)s ORDER BY text_id


-- name: changed
-- How many vectors came after a generation; no more are counted than `most`. Parameters: newest, lacking, most.

SELECT count(*)
FROM (SELECT FROM {vector} WHERE text_id > %(newest)s OR text_id = ANY (%(lacking)s::bigint[]) LIMIT %(most)s) AS changed


-- name: nearest_changed
-- The texts nearest to a vector among those that came after a generation. They are chosen first, so that no ANN index is
-- asked, which would find too few. Parameters: newest, lacking, query, n.

WITH changed AS MATERIALIZED (
    SELECT vector.text_id, vector.embedding FROM {vector} AS vector {joined}
    WHERE vector.vector_name = {vector_name}
      AND (vector.text_id > %(newest)s OR vector.text_id = ANY (%(lacking)s::bigint[])) {matching}
)
SELECT text_id
FROM (SELECT text_id, embedding <=> %(query)s::{type} AS distance FROM changed) AS measured
WHERE distance <> 'NaN'
ORDER BY distance
FETCH FIRST %(n)s ROWS WITH TIES


-- name: texts
-- The texts that have a vector, in the order of their ids. {vector_name}: a literal.

COPY (
    SELECT text.id, text.text
    FROM {text} AS text
    JOIN {vector} AS vector ON vector.text_id = text.id
    WHERE text.vector_name = {vector_name}
    ORDER BY text.id
) TO STDOUT


-- name: items
-- The committed items, in the order of their keys.

COPY (
    SELECT item_key, payload::text FROM {item} WHERE committed_hash IS NOT NULL ORDER BY item_key COLLATE "C"
) TO STDOUT


-- name: item_texts
-- The texts that have a vector, in the order of their ids: each with the place of its item in `items`, from 0.

COPY (
    SELECT text.id, item.place, text.vector_name, text.chunk, text.text
    FROM (
        SELECT item_key, row_number() OVER (ORDER BY item_key COLLATE "C") - 1 AS place
        FROM {item} WHERE committed_hash IS NOT NULL
    ) AS item
    JOIN {text} AS text ON text.item_key = item.item_key
    JOIN {vector} AS vector ON vector.text_id = text.id
    ORDER BY text.id
) TO STDOUT
