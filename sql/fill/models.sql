-- The models of a collection beside the active one. Parameter: collection.

SELECT model.fingerprint, model.dimension, model.storage, model.profile
FROM embeddings.model
JOIN embeddings.collection ON collection.name = model.collection
WHERE model.collection = %(collection)s AND model.fingerprint <> collection.fingerprint
ORDER BY model.created_at, model.fingerprint
