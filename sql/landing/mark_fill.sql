-- Models beside the one that landed lack the new texts of this batch, until they are filled. A batch that an open
-- migration has not come to yet stays without a row. Parameters: collection, batch, fingerprint, new_texts.

INSERT INTO embeddings.fill (collection, fingerprint, batch, complete)
SELECT model.collection, model.fingerprint, batch.batch, %(new_texts)s = 0
FROM embeddings.model
JOIN embeddings.batch ON batch.collection = model.collection AND batch.batch = %(batch)s
LEFT JOIN embeddings.fill
  ON fill.collection = model.collection AND fill.fingerprint = model.fingerprint AND fill.batch = batch.batch
WHERE model.collection = %(collection)s AND model.fingerprint <> %(fingerprint)s
  AND (fill.batch IS NOT NULL OR batch.landed_at IS NULL)
ON CONFLICT (collection, fingerprint, batch) DO UPDATE SET complete = fill.complete AND excluded.complete
