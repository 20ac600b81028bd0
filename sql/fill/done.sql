-- Parameters: collection, fingerprint; batches, and for each complete and file.

INSERT INTO embeddings.fill (collection, fingerprint, batch, complete, file)
SELECT %(collection)s, %(fingerprint)s, batch, complete, file
FROM unnest(%(batches)s::bigint[], %(complete)s::boolean[], %(file)s::text[]) AS filled (batch, complete, file)
ON CONFLICT (collection, fingerprint, batch)
DO UPDATE SET complete = excluded.complete, file = coalesce(excluded.file, fill.file)
