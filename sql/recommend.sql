-- Recommendations: vectors and values of chosen items, and items by what others liked. {condition}: of {item} AS item;
-- {vector_name}: a literal; {values}: an array of double precision; {value}: what to order by.


-- name: vectors_of_items
-- The direction of each of these items that has a vector of that name, by its place: the mean of its chunks'. {keys}: an
-- array.

SELECT asked.place, avg(l2_normalize(vector.embedding)::vector) AS direction
FROM unnest({keys}::text[]) WITH ORDINALITY AS asked (item_key, place)
JOIN {text} AS text ON text.item_key = asked.item_key AND text.vector_name = {vector_name}
JOIN {vector} AS vector ON vector.text_id = text.id
GROUP BY asked.place


-- name: items
-- These items, each with its first text. Parameters: item_keys, vector_name (the one to prefer).

SELECT item.item_key, item.payload, coalesce(text.text, ''), coalesce(text.vector_name, ''), coalesce(text.chunk, 0)
FROM {item} AS item
LEFT JOIN LATERAL (
    SELECT text.text, text.vector_name, text.chunk
    FROM {text} AS text
    WHERE text.item_key = item.item_key
    ORDER BY text.vector_name <> %(vector_name)s, text.vector_name, text.chunk
    LIMIT 1
) AS text ON true
WHERE item.item_key = ANY (%(item_keys)s) AND item.committed_hash IS NOT NULL


-- name: values
-- What these items are ranked by. Parameter: item_keys.

SELECT item.item_key, {values} FROM {item} AS item WHERE item.item_key = ANY (%(item_keys)s)


-- name: cooccurring
-- What most of those liked who liked these items. Parameters: collection, item_keys, weights, most.

SELECT item.item_key, sum(asked.weight * there.score)::double precision AS score
FROM unnest(%(item_keys)s::text[], %(weights)s::double precision[]) AS asked (item_key, weight)
JOIN embeddings.cooccurrence AS there ON there.collection = %(collection)s AND there.item_key = asked.item_key
JOIN {item} AS item ON item.item_key = there.other_key
WHERE item.committed_hash IS NOT NULL AND ({condition})
GROUP BY item.item_key
HAVING sum(asked.weight * there.score) > 0
ORDER BY score DESC, item.item_key COLLATE "C"
LIMIT %(most)s


-- name: most_liked
-- What most people liked. Parameters: collection, most.

SELECT item.item_key, liked.people::double precision
FROM embeddings.liked AS liked
JOIN {item} AS item ON item.item_key = liked.item_key
WHERE liked.collection = %(collection)s AND item.committed_hash IS NOT NULL AND ({condition})
ORDER BY liked.people DESC, item.item_key COLLATE "C"
LIMIT %(most)s


-- name: highest
-- The items with the highest value. Parameter: most.

SELECT item.item_key
FROM {item} AS item
WHERE {value} IS NOT NULL AND item.committed_hash IS NOT NULL AND ({condition})
ORDER BY {value} DESC
LIMIT %(most)s
