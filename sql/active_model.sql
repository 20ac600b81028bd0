-- Parameter: collection.

SELECT model.fingerprint, model.dimension, model.storage, model.profile
FROM embeddings.collection
JOIN embeddings.model ON model.collection = collection.name AND model.fingerprint = collection.fingerprint
WHERE collection.name = %(collection)s
