-- The first landing after a version of the collection. Parameters: collection, version.

SELECT min(landed_at) FROM embeddings.batch WHERE collection = %(collection)s AND version > %(version)s
