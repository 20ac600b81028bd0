-- What is to be done, derived from state: batches with a dirty item, and batches whose texts were rendered with
-- another definition than the collection's; and of how many items. Parameters: collection, and
-- due: without the batches that wait for their next try.

SELECT dirty.batch, max(items)
FROM (
    SELECT batch, count(*) AS items FROM {item} WHERE seen_hash IS DISTINCT FROM landed_hash GROUP BY batch
    UNION ALL
    SELECT batch.batch, (SELECT count(*) FROM {item} AS item WHERE item.batch = batch.batch)
    FROM embeddings.batch
    JOIN embeddings.collection ON collection.name = batch.collection
    WHERE batch.collection = %(collection)s
      AND batch.definition_hash IS DISTINCT FROM collection.definition_hash
) AS dirty
JOIN embeddings.batch ON batch.collection = %(collection)s AND batch.batch = dirty.batch
WHERE items > 0 AND NOT (%(due)s AND coalesce(batch.next_try > now(), false))
GROUP BY dirty.batch
ORDER BY dirty.batch
