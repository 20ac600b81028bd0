-- Vectors that are there already, for the texts of a batch.
-- Placeholders: {item} and {text}, the collection's tables; {vector}, the model's vectors; {batch}, a number.


-- name: vectors_of_batch
-- The committed vectors of a batch, for COPY, which takes no parameters. OFFSET keeps it to the indexes: as long as tables
-- grow quickly, the planner does not know how large they are, and reads them as a whole for each batch.

SELECT vector.content_hash, vector.embedding
FROM {item} AS item
CROSS JOIN LATERAL (SELECT text.id FROM {text} AS text WHERE text.item_key = item.item_key OFFSET 0) AS text
CROSS JOIN LATERAL (
    SELECT vector.content_hash, vector.embedding FROM {vector} AS vector WHERE vector.text_id = text.id OFFSET 0
) AS vector
WHERE item.batch = {batch} AND (item.committed_hash IS NOT NULL OR item.payload IS NOT NULL)
