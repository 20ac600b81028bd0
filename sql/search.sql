-- The items nearest to a vector. Parameters: query, nearest (texts), k (items).

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
GROUP BY item.item_key
ORDER BY score DESC, item.item_key
LIMIT %(k)s
