-- A batch that failed waits before it is tried again: 1, 2, 4 … minutes, at most 64. Parameters: collection, batch.

UPDATE embeddings.batch
SET attempts = attempts + 1, next_try = now() + interval '1 minute' * 2 ^ least(attempts, 6)
WHERE collection = %(collection)s AND batch = %(batch)s
