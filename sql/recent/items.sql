-- Items first seen lately of which nothing has landed, the oldest first, without batches that wait for their next try.
-- Parameters: collection, days, limit.

SELECT item.batch, item_key
FROM {item} AS item
JOIN embeddings.batch ON batch.collection = %(collection)s AND batch.batch = item.batch
WHERE landed_hash IS NULL AND seen_hash IS NOT NULL AND first_seen_at >= now() - interval '1 day' * %(days)s
  AND coalesce(batch.next_try <= now(), true)
ORDER BY first_seen_at, item_key
LIMIT %(limit)s
