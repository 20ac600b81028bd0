-- Queries: nearest neighbours, exact or by an index. {vector_name}: a literal; {type}: halfvec(n) or vector(n).


-- name: items
-- The items nearest to a vector, each with its nearest text. Parameters: query, nearest (texts), k (items).
-- Texts as near as the last one are taken too, so that equal ones come in the order of their items' keys. A vector of
-- zeros, as somebody else may write it, is at no distance: NaN, which is ordered last.

WITH nearest AS MATERIALIZED (
    SELECT text_id, embedding <=> %(query)s::{type} AS distance
    FROM {vector}
    WHERE vector_name = {vector_name}
    ORDER BY distance
    FETCH FIRST %(nearest)s ROWS WITH TIES
), best AS (
    SELECT DISTINCT ON (text.item_key) text.item_key, nearest.distance, text.text
    FROM nearest
    JOIN {text} AS text ON text.id = nearest.text_id
    WHERE nearest.distance <> 'NaN'
    ORDER BY text.item_key, nearest.distance, text.chunk
)
SELECT item.item_key, 1 - best.distance AS score, item.payload, best.text
FROM best
JOIN {item} AS item ON item.item_key = best.item_key
ORDER BY score DESC, item.item_key COLLATE "C"
LIMIT %(k)s


-- name: ids
-- Live items behind text ids that an index found, scored and ordered as `items` does. Parameters: query, ids, vector_name.

SELECT item.item_key, 1 - (vector.embedding <=> %(query)s::{type}) AS score, item.payload, text.text
FROM {text} AS text
JOIN {item} AS item ON item.item_key = text.item_key
JOIN {vector} AS vector ON vector.text_id = text.id
WHERE text.id = ANY (%(ids)s) AND text.vector_name = %(vector_name)s
  AND vector.embedding <=> %(query)s::{type} <> 'NaN'
ORDER BY score DESC, item.item_key COLLATE "C", text.chunk


-- name: texts
-- The texts nearest to a vector. Parameters: query, n.

SELECT text_id, 1 - distance
FROM (
    SELECT text_id, embedding <=> %(query)s::{type} AS distance
    FROM {vector}
    WHERE vector_name = {vector_name}
    ORDER BY distance
    LIMIT %(n)s
) AS nearest
WHERE distance <> 'NaN'


-- name: settings
-- For this transaction: how thoroughly to look. Parameters: table, exact_below (bytes), ef_search.

SELECT
    set_config('hnsw.ef_search', %(ef_search)s, true),
    set_config('ivfflat.probes', '20', true),
    set_config('enable_indexscan',
               CASE WHEN pg_table_size(%(table)s::regclass) < %(exact_below)s THEN 'off' ELSE 'on' END, true)
