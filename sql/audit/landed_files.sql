-- The batches that have landed, and the file of theirs in the lake. Parameter: collection.

SELECT batch, file FROM embeddings.batch WHERE collection = %(collection)s AND file IS NOT NULL ORDER BY batch
