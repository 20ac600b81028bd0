-- The first run makes its model the active one. Parameters: collection, fingerprint, profile, dimension, storage.

WITH model AS (
    INSERT INTO embeddings.model (collection, fingerprint, profile, dimension, storage)
    VALUES (%(collection)s, %(fingerprint)s, %(profile)s, %(dimension)s, %(storage)s)
    ON CONFLICT DO NOTHING
)
UPDATE embeddings.collection SET fingerprint = %(fingerprint)s WHERE name = %(collection)s
