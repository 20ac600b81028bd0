-- A collection becomes known, and its first model its current one. No placeholders.


-- name: register
-- Parameters: collection, definition_hash.

INSERT INTO embeddings.collection (name, definition_hash)
VALUES (%(collection)s, %(definition_hash)s)
ON CONFLICT DO NOTHING


-- name: in_force
-- The definition in force, what this place proposed last, whether that was lately, and whether any place has proposed
-- this one. Parameters: collection, place, outcome_hash.

SELECT collection.outcome_hash, here.outcome_hash,
       coalesce(here.proposed_at BETWEEN now() - interval '1 day' AND now(), false),
       EXISTS (SELECT FROM embeddings.proposed_definition AS proposed
               WHERE proposed.collection = collection.name AND proposed.outcome_hash = %(outcome_hash)s)
FROM embeddings.collection
LEFT JOIN embeddings.proposed_definition AS here ON here.collection = collection.name AND here.place = %(place)s
WHERE collection.name = %(collection)s


-- name: lock
-- Nobody else proposes a definition until the transaction ends. Parameter: collection.

SELECT FROM embeddings.collection WHERE name = %(collection)s FOR NO KEY UPDATE


-- name: propose
-- Parameters: collection, definition_hash, outcome_hash.

UPDATE embeddings.collection SET definition_hash = %(definition_hash)s, outcome_hash = %(outcome_hash)s
WHERE name = %(collection)s
  AND (definition_hash <> %(definition_hash)s OR outcome_hash IS DISTINCT FROM %(outcome_hash)s)


-- name: proposed
-- Places that have not been heard of for a season are forgotten. Parameters: collection, place, outcome_hash.

WITH forgotten AS (
    DELETE FROM embeddings.proposed_definition
    WHERE collection = %(collection)s AND place <> %(place)s AND proposed_at < now() - interval '90 days'
)
INSERT INTO embeddings.proposed_definition (collection, place, outcome_hash)
VALUES (%(collection)s, %(place)s, %(outcome_hash)s)
ON CONFLICT (collection, place) DO UPDATE SET outcome_hash = excluded.outcome_hash, proposed_at = now()


-- name: by_whom
-- Where the definition in force comes from. Parameter: collection.

SELECT place, proposed_at
FROM embeddings.proposed_definition AS proposed
JOIN embeddings.collection ON collection.name = proposed.collection AND collection.outcome_hash = proposed.outcome_hash
WHERE collection.name = %(collection)s
ORDER BY proposed_at DESC
LIMIT 1


-- name: aside
-- Parameters: collection, place, reason.

UPDATE embeddings.proposed_definition SET aside = %(reason)s, aside_at = now()
WHERE collection = %(collection)s AND place = %(place)s


-- name: who_is_aside
-- Processes that stepped aside within the last minute: why. Parameter: collection.

SELECT DISTINCT aside FROM embeddings.proposed_definition
WHERE collection = %(collection)s AND aside_at BETWEEN now() - interval '1 minute' AND now()
ORDER BY aside


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


-- name: knows_search
-- Whether the database knows how the collection is searched. Parameters: collection, digest.

SELECT EXISTS (
    SELECT FROM embeddings.search_definition WHERE collection = %(collection)s AND digest = %(digest)s)


-- name: search
-- For searches in SQL. Parameters: collection, digest, vectors, filters, words, texts_per_item.

INSERT INTO embeddings.search_definition (collection, digest, vectors, filters, words, texts_per_item)
VALUES (%(collection)s, %(digest)s, %(vectors)s, %(filters)s, %(words)s, %(texts_per_item)s)
ON CONFLICT (collection) DO UPDATE SET
    digest = excluded.digest, vectors = excluded.vectors, filters = excluded.filters, words = excluded.words,
    texts_per_item = excluded.texts_per_item
