-- Makes the items with one of these texts dirty, under their batches' locks: nothing of them counts as landed.
-- Parameters: collection, content_hashes (NULL: all).

UPDATE {item} AS item
SET landed_hash = NULL, seen_at = now()
FROM {text} AS text
JOIN embeddings.quarantine ON quarantine.content_hash = text.content_hash
WHERE text.item_key = item.item_key AND item.seen_hash IS NOT NULL AND item.landed_hash IS NOT NULL
  AND quarantine.collection = %(collection)s
  AND (%(content_hashes)s::bytea[] IS NULL OR quarantine.content_hash = ANY (%(content_hashes)s))
