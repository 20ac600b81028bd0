-- The landing's last statement: no row, and so a rollback, where another model has become the active one.
-- Parameters: collection, batch, fingerprint, changed.

WITH raised AS (
    UPDATE embeddings.collection
    SET version = version + %(changed)s::boolean::integer
    WHERE name = %(collection)s AND fingerprint = %(fingerprint)s
    RETURNING version
)
UPDATE embeddings.batch SET version = raised.version
FROM raised
WHERE collection = %(collection)s AND batch = %(batch)s
RETURNING raised.version
