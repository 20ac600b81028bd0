-- A batch that has been tried waits before it is tried again: 1, 2, 4 … minutes, at most 64. Its landing ends that. Within
-- a wait it is still the same try. Parameters: collection, batches.

UPDATE embeddings.batch
SET attempts = attempts + 1, next_try = now() + interval '1 minute' * 2 ^ least(attempts, 6)
WHERE collection = %(collection)s AND batch = ANY (%(batches)s::bigint[]) AND coalesce(next_try <= now(), true)
