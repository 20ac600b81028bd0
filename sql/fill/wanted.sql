-- Which of these batches a run keeps current for a model beside the active one: all, but for those that an open
-- migration's backfill has still to come to. Parameters: collection, fingerprint, batches.

SELECT batch.batch
FROM embeddings.batch
LEFT JOIN embeddings.fill
  ON fill.collection = batch.collection AND fill.fingerprint = %(fingerprint)s AND fill.batch = batch.batch
WHERE batch.collection = %(collection)s AND batch.batch = ANY (%(batches)s)
  AND (fill.batch IS NOT NULL OR batch.landed_at IS NULL OR NOT EXISTS (
          SELECT FROM embeddings.migration
          WHERE migration.collection = batch.collection AND migration.to_fingerprint = %(fingerprint)s
            AND migration.phase = 'expanded'))
ORDER BY batch.batch
