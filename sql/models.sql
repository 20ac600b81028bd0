-- Which models a collection has, and where it stands.

-- name: current
-- Parameter: collection.

SELECT model.fingerprint, model.dimension, model.storage, model.profile
FROM embeddings.collection
JOIN embeddings.model ON model.collection = collection.name AND model.fingerprint = collection.fingerprint
WHERE collection.name = %(collection)s


-- name: state
-- Parameter: collection.

SELECT collection.fingerprint, collection.version, collection.epoch::text, scan.full_scan_at
FROM embeddings.collection
LEFT JOIN embeddings.scan ON scan.collection = collection.name
WHERE collection.name = %(collection)s
