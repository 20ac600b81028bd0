-- What a FAISS index is of.


-- name: version
-- The content that a collection's current model table has. Parameter: collection.

SELECT collection.fingerprint, identity.id::text, collection.epoch::text, collection.version, collection.stamp::text
FROM embeddings.collection, embeddings.database_identity AS identity
WHERE collection.name = %(collection)s


-- name: was
-- Whether a collection once had this stamp. Parameters: collection, version, stamp.

SELECT EXISTS (
    SELECT FROM embeddings.collection_stamp
    WHERE collection = %(collection)s AND version = %(version)s AND stamp::text = %(stamp)s)
