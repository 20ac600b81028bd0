-- What is to be done, derived from state: batches with a dirty item, and batches whose texts were rendered with
-- another definition than the collection's; and of how many items. Parameters: collection, and
-- due: without the batches that wait for their next try.

WITH other_definition AS MATERIALIZED (  -- else the items of every batch are counted first
    SELECT batch.batch
    FROM embeddings.batch
    JOIN embeddings.collection ON collection.name = batch.collection
    WHERE batch.collection = %(collection)s AND batch.definition_hash IS DISTINCT FROM collection.definition_hash
), dirty AS (
    SELECT batch, count(*) AS items FROM {item} WHERE seen_hash IS DISTINCT FROM landed_hash GROUP BY batch
    UNION ALL
    SELECT batch, count(*) FROM other_definition JOIN {item} USING (batch) GROUP BY batch
)
SELECT dirty.batch, max(items)
FROM dirty
JOIN embeddings.batch ON batch.collection = %(collection)s AND batch.batch = dirty.batch
WHERE NOT (%(due)s AND coalesce(batch.next_try > now(), false))
GROUP BY dirty.batch
ORDER BY dirty.batch
