-- Parameters: collection, content_hashes (NULL: all).

UPDATE embeddings.quarantine
SET attempts = 0, next_try = now()
WHERE collection = %(collection)s
  AND (%(content_hashes)s::bytea[] IS NULL OR content_hash = ANY (%(content_hashes)s))
