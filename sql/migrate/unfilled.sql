-- Batches that landed and that the next model is not whole in: none, or no swap. Parameters: collection, to.

SELECT batch.batch
FROM embeddings.batch
LEFT JOIN embeddings.fill
  ON fill.collection = batch.collection AND fill.fingerprint = %(to)s AND fill.batch = batch.batch
WHERE batch.collection = %(collection)s AND batch.landed_at IS NOT NULL AND NOT coalesce(fill.complete, false)
ORDER BY batch.batch
