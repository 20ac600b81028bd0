-- Parameters: collection, fingerprint; batches, and for each complete, wrote, and file: of those that wrote nothing it
-- stays where there is one.

INSERT INTO embeddings.fill (collection, fingerprint, batch, complete, file)
SELECT %(collection)s, %(fingerprint)s, filled.batch, filled.complete,
       CASE WHEN filled.wrote THEN coalesce(filled.file, former.file) ELSE coalesce(former.file, filled.file) END
FROM unnest(%(batches)s::bigint[], %(complete)s::boolean[], %(wrote)s::boolean[], %(file)s::text[])
     AS filled (batch, complete, wrote, file)
LEFT JOIN embeddings.fill AS former
  ON former.collection = %(collection)s AND former.fingerprint = %(fingerprint)s AND former.batch = filled.batch
ON CONFLICT (collection, fingerprint, batch) DO UPDATE SET complete = excluded.complete, file = excluded.file
