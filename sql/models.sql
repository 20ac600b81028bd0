-- Which models a collection has, and where it stands.

-- name: current
-- Parameter: collection.

SELECT model.fingerprint, model.dimension, model.storage, model.profile
FROM embeddings.collection
JOIN embeddings.model ON model.collection = collection.name AND model.fingerprint = collection.fingerprint
WHERE collection.name = %(collection)s


-- name: made_by
-- The model whose vectors a profile makes, by its own fingerprint, if it was bound to one. Parameters: collection, maker.

SELECT fingerprint FROM embeddings.maker WHERE collection = %(collection)s AND maker = %(maker)s


-- name: bind
-- Parameters: collection, maker, fingerprint, profile, cosine.

INSERT INTO embeddings.maker (collection, maker, fingerprint, profile, cosine)
VALUES (%(collection)s, %(maker)s, %(fingerprint)s, %(profile)s, %(cosine)s)
ON CONFLICT (collection, maker) DO UPDATE SET
    fingerprint = excluded.fingerprint, profile = excluded.profile, cosine = excluded.cosine, bound_at = now()


-- name: state
-- A time of the last full scan that is yet to come counts as none: the clock was ahead for a while. Parameter: collection.

SELECT collection.fingerprint, collection.version, collection.epoch::text,
       CASE WHEN scan.full_scan_at <= now() THEN scan.full_scan_at END, now()
FROM embeddings.collection
LEFT JOIN embeddings.scan ON scan.collection = collection.name
WHERE collection.name = %(collection)s


-- name: identity
-- What files of a collection are of. Parameter: collection.

SELECT identity.id::text, collection.epoch::text
FROM embeddings.collection, embeddings.database_identity AS identity
WHERE collection.name = %(collection)s


-- name: has_vectors
-- Whether a vector is committed. Parameter: collection.

SELECT version > 0 AND EXISTS (SELECT FROM embeddings.batch WHERE collection = name AND committed_at IS NOT NULL)
FROM embeddings.collection
WHERE name = %(collection)s


-- name: shadows
-- The models that are kept current beside the current one. Parameter: collection.

SELECT model.fingerprint, model.dimension, model.storage, model.profile
FROM embeddings.model
JOIN embeddings.collection ON collection.name = model.collection
WHERE model.collection = %(collection)s AND model.fingerprint <> collection.fingerprint
ORDER BY model.created_at, model.fingerprint


-- name: lacking
-- The one place that says what a model lacks: texts without their vector, blank ones aside. A view made with the model.
--   stale:   there is a vector, of another text
--   excused: the text is in quarantine
-- {collection_name}, {model_fingerprint}: literals.

CREATE OR REPLACE VIEW {lacking} AS
SELECT text.id AS text_id, text.item_key, text.vector_name, text.content_hash,
       vector.text_id IS NOT NULL AS stale, quarantine.content_hash IS NOT NULL AS excused
FROM {text} AS text
LEFT JOIN {written} AS vector ON vector.text_id = text.id
LEFT JOIN embeddings.quarantine
  ON quarantine.collection = {collection_name} AND quarantine.fingerprint = {model_fingerprint}
 AND quarantine.content_hash = text.content_hash
WHERE NOT text.blank AND (vector.text_id IS NULL OR vector.content_hash <> text.content_hash)


-- name: drop_lacking
DROP VIEW IF EXISTS {lacking}
