-- The swap begins: whoever lands with the former model waits here, and is rolled back. No row: it is not the active one.
-- Parameters: collection, from, to.

UPDATE embeddings.collection SET fingerprint = %(to)s, version = version + 1
WHERE name = %(collection)s AND fingerprint = %(from)s
RETURNING version
