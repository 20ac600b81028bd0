-- What is to be done, derived from state: batches with a dirty item, and batches whose texts were rendered with
-- another definition than the collection's; and of how many items. Parameter: collection.

SELECT batch, max(items)
FROM (
    SELECT batch, count(*) AS items FROM {item} WHERE seen_hash IS DISTINCT FROM landed_hash GROUP BY batch
    UNION ALL
    SELECT batch.batch, (SELECT count(*) FROM {item} AS item WHERE item.batch = batch.batch)
    FROM embeddings.batch
    JOIN embeddings.collection ON collection.name = batch.collection
    WHERE batch.collection = %(collection)s
      AND batch.definition_hash IS DISTINCT FROM collection.definition_hash
) AS dirty
WHERE items > 0
GROUP BY batch
ORDER BY batch;
