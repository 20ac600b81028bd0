-- A collection becomes known, and its first model its current one. No placeholders.


-- name: register
-- Parameters: collection, definition_hash.

INSERT INTO embeddings.collection (name, definition_hash)
VALUES (%(collection)s, %(definition_hash)s)
ON CONFLICT (name) DO UPDATE SET definition_hash = excluded.definition_hash
WHERE collection.definition_hash <> excluded.definition_hash


-- name: activate
-- The first run makes its model the current one. Parameters: collection, fingerprint, profile, dimension, storage,
-- identity.

WITH model AS (
    INSERT INTO embeddings.model (collection, fingerprint, profile, dimension, storage, identity)
    VALUES (%(collection)s, %(fingerprint)s, %(profile)s, %(dimension)s, %(storage)s, %(identity)s)
    ON CONFLICT DO NOTHING
)
UPDATE embeddings.collection SET fingerprint = %(fingerprint)s WHERE name = %(collection)s


-- name: new_epoch
-- The tables were made anew: ids may come again, so no older FAISS generation counts. Parameter: collection.

UPDATE embeddings.collection SET epoch = gen_random_uuid(), version = version + 1 WHERE name = %(collection)s


-- name: identity
-- What a user's column was adopted for, when it is adopted anew. Parameters: collection, fingerprint, identity.

UPDATE embeddings.model SET identity = %(identity)s WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s
