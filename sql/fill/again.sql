-- Batches whose texts left the quarantine have to be looked at again. Parameters: collection, batches.

UPDATE embeddings.fill SET complete = false WHERE collection = %(collection)s AND batch = ANY (%(batches)s) AND complete
