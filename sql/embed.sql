-- Vectors that are there already, for the texts of a batch.
-- Placeholders: {item} and {text}, the collection's tables; {vector}, the model's vectors; {batch}, a number.


-- name: vectors_of_batch
-- The committed vectors of a batch, for COPY, which takes no parameters.

SELECT vector.content_hash, vector.embedding
FROM {item} AS item
JOIN {text} AS text USING (item_key)
JOIN {vector} AS vector ON vector.text_id = text.id
WHERE item.batch = {batch}
