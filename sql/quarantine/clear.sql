-- Parameters: collection, content_hashes (NULL: all).

DELETE FROM embeddings.quarantine
WHERE collection = %(collection)s
  AND (%(content_hashes)s::bytea[] IS NULL OR content_hash = ANY (%(content_hashes)s))
