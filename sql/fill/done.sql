-- Parameters: collection, fingerprint, batch, complete, file.

INSERT INTO embeddings.fill (collection, fingerprint, batch, complete, file)
VALUES (%(collection)s, %(fingerprint)s, %(batch)s, %(complete)s, %(file)s)
ON CONFLICT (collection, fingerprint, batch)
DO UPDATE SET complete = excluded.complete, file = coalesce(excluded.file, fill.file)
