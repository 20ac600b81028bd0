-- The file of a batch that landed. Parameters: collection, batch.

SELECT file FROM embeddings.batch WHERE collection = %(collection)s AND batch = %(batch)s
