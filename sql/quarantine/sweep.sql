-- Forgets texts that no item has any more. Parameter: collection.

DELETE FROM embeddings.quarantine
WHERE collection = %(collection)s
  AND NOT EXISTS (SELECT FROM {text} AS text WHERE text.content_hash = quarantine.content_hash)
