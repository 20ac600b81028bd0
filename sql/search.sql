-- Queries: nearest neighbours, exact or by an index. {vector_name}: a literal; {type}: halfvec(n) or vector(n).


-- name: items
-- The items nearest to a vector. A vector of zeros, as somebody else may write it, is at no distance: NaN, which is
-- ordered last. Parameters: query, nearest (texts), k (items).

WITH nearest AS MATERIALIZED (
    SELECT text_id, embedding <=> %(query)s::{type} AS distance
    FROM {vector}
    WHERE vector_name = {vector_name}
    ORDER BY distance
    LIMIT %(nearest)s
)
SELECT item.item_key, 1 - min(nearest.distance) AS score, item.payload
FROM nearest
JOIN {text} AS text ON text.id = nearest.text_id
JOIN {item} AS item ON item.item_key = text.item_key
WHERE nearest.distance <> 'NaN'
GROUP BY item.item_key
ORDER BY score DESC, item.item_key
LIMIT %(k)s


-- name: ids
-- Live items behind text ids that an index found. Parameters: ids, vector_name.

SELECT text.id, item.item_key, item.payload
FROM {text} AS text
JOIN {item} AS item ON item.item_key = text.item_key
WHERE text.id = ANY (%(ids)s) AND text.vector_name = %(vector_name)s


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
