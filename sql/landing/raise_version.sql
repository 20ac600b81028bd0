-- The landing's last statement: no row, and so a rollback, where another model has become the active one. And the file
-- of the active model's vectors. Parameters: collection, batch, fingerprint, changed, file.

WITH raised AS (
    UPDATE embeddings.collection
    SET version = version + %(changed)s::boolean::integer
    WHERE name = %(collection)s AND fingerprint = %(fingerprint)s
    RETURNING version
), filed AS (
    INSERT INTO embeddings.fill (collection, fingerprint, batch, complete, file)
    SELECT %(collection)s, %(fingerprint)s, %(batch)s, true, %(file)s FROM raised
    ON CONFLICT (collection, fingerprint, batch) DO UPDATE SET complete = true, file = excluded.file
)
UPDATE embeddings.batch SET version = raised.version
FROM raised
WHERE collection = %(collection)s AND batch = %(batch)s
RETURNING raised.version
