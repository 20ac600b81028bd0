-- Vectors that are there already, for the texts of a batch.
-- Placeholders: {item} and {text}, the collection's tables; {vector}, the model's vectors; {written}, the relation that
-- says which texts have theirs; {batch}, a number.


-- name: content_hashes
-- Which texts of these items have their vector. Parameter: keys.

SELECT vector.content_hash
FROM {text} AS text
JOIN {written} AS vector ON vector.text_id = text.id AND vector.content_hash = text.content_hash
WHERE text.item_key = ANY (%(keys)s)


-- name: vectors_of_batch
-- The committed vectors of a batch, for COPY, which takes no parameters.

SELECT vector.content_hash, vector.embedding
FROM {item} AS item
JOIN {text} AS text USING (item_key)
JOIN {vector} AS vector ON vector.text_id = text.id
WHERE item.batch = {batch}
