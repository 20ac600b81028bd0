-- Batches in which a model beside the active one lacks vectors, without those that an open migration's backfill has
-- not come to, or that wait for their next try. Parameters: collection, due.

SELECT DISTINCT batch.batch
FROM embeddings.collection
JOIN embeddings.model ON model.collection = collection.name AND model.fingerprint <> collection.fingerprint
JOIN embeddings.batch ON batch.collection = collection.name AND batch.landed_at IS NOT NULL
LEFT JOIN embeddings.fill
  ON fill.collection = collection.name AND fill.fingerprint = model.fingerprint AND fill.batch = batch.batch
WHERE collection.name = %(collection)s
  AND NOT (%(due)s AND coalesce(batch.next_try > now(), false))
  AND CASE WHEN fill.batch IS NOT NULL THEN NOT fill.complete
           ELSE NOT EXISTS (
               SELECT FROM embeddings.migration
               WHERE migration.collection = collection.name AND migration.to_fingerprint = model.fingerprint
                 AND migration.phase = 'expanded') END
ORDER BY batch.batch
