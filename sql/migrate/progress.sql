-- How far a model beside the active one is filled, in batches that have landed. Parameters: collection, fingerprint.

SELECT count(*), count(*) FILTER (WHERE fill.complete)
FROM embeddings.batch
LEFT JOIN embeddings.fill
  ON fill.collection = batch.collection AND fill.fingerprint = %(fingerprint)s AND fill.batch = batch.batch
WHERE batch.collection = %(collection)s AND batch.landed_at IS NOT NULL
