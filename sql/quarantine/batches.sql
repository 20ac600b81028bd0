-- The batches with an item that has one of these texts. Parameters: collection, content_hashes (NULL: all).

SELECT DISTINCT item.batch
FROM embeddings.quarantine
JOIN {text} AS text ON text.content_hash = quarantine.content_hash
JOIN {item} AS item USING (item_key)
WHERE quarantine.collection = %(collection)s
  AND (%(content_hashes)s::bytea[] IS NULL OR quarantine.content_hash = ANY (%(content_hashes)s))
ORDER BY item.batch
