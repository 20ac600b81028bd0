-- What is to be done, derived from state: batches with a dirty item, and batches whose texts were rendered with
-- another definition than the collection's. Parameter: collection.

SELECT DISTINCT batch FROM {item} WHERE seen_hash IS DISTINCT FROM landed_hash
UNION
SELECT batch.batch
FROM embeddings.batch
JOIN embeddings.collection ON collection.name = batch.collection
WHERE batch.collection = %(collection)s
  AND batch.definition_hash IS DISTINCT FROM collection.definition_hash
  AND EXISTS (SELECT FROM {item} AS item WHERE item.batch = batch.batch)
ORDER BY 1;
