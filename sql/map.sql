-- The map of a collection: a point for each item. {coloured}: a column for each that points are coloured by; {label}: what
-- a point is called; {value}: what a filter compares.


-- name: items
-- The committed items, in the order of their keys' hashes: the first ones are a sample of all.

COPY (
    SELECT item.item_key, {label}{coloured}
    FROM {item} AS item
    WHERE committed_hash IS NOT NULL
    ORDER BY md5(convert_to(item_key, 'UTF8')) COLLATE "C", item_key COLLATE "C"
) TO STDOUT


-- name: vectors
-- The vectors of a name ({vector_name}), each with the place of its item in `items`, from 0.

SELECT item.place, vector.embedding
FROM (
    SELECT item_key,
           row_number() OVER (ORDER BY md5(convert_to(item_key, 'UTF8')) COLLATE "C", item_key COLLATE "C") - 1 AS place
    FROM {item} WHERE committed_hash IS NOT NULL
) AS item
JOIN {text} AS text ON text.item_key = item.item_key
JOIN {vector} AS vector ON vector.text_id = text.id
WHERE vector.vector_name = {vector_name}


-- name: counts
-- How many items are committed, and how many wait for it.

SELECT count(committed_hash), count(*) FILTER (WHERE committed_hash IS NULL AND seen_hash IS NOT NULL) FROM {item}


-- name: categories
-- The most frequent values that points are coloured by. Parameter: most.

SELECT value, count(*)
FROM (SELECT {value} AS value FROM {item} AS item WHERE committed_hash IS NOT NULL) AS valued
WHERE value <> ''
GROUP BY value
ORDER BY count(*) DESC, value COLLATE "C"
LIMIT %(most)s
