-- Has batches done anew from their rows on; vectors that are in the table are used again. Parameters: collection, batches.

UPDATE embeddings.batch
SET definition_hash = NULL
WHERE collection = %(collection)s AND batch = ANY (%(batches)s::bigint[])
