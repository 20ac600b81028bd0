-- The batches that have landed, and the file of theirs in the lake. Parameters: collection, fingerprint.

SELECT batch, file FROM embeddings.fill
WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s AND file IS NOT NULL
ORDER BY batch
