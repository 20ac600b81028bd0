-- The file of a batch that landed. Parameters: collection, fingerprint, batch.

SELECT file FROM embeddings.fill
WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s AND batch = %(batch)s
