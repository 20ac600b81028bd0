-- Each batch's landed file in the lake becomes the next model's; the former model is whole, and kept current from here.
-- Parameters: collection, from, to.

WITH next AS (
    DELETE FROM embeddings.fill WHERE collection = %(collection)s AND fingerprint = %(to)s RETURNING batch, file
), former AS (
    INSERT INTO embeddings.fill (collection, fingerprint, batch, complete, file)
    SELECT collection, %(from)s, batch, true, file
    FROM embeddings.batch
    WHERE collection = %(collection)s AND landed_at IS NOT NULL
    ON CONFLICT (collection, fingerprint, batch) DO UPDATE SET complete = true, file = excluded.file
)
UPDATE embeddings.batch SET file = next.file
FROM next
WHERE batch.collection = %(collection)s AND batch.batch = next.batch
