-- Batches in which a landed item lacks a vector that it should have. Parameters: collection, fingerprint.

SELECT DISTINCT item.batch
FROM {text} AS text
JOIN {item} AS item USING (item_key)
LEFT JOIN {written} AS vector ON vector.text_id = text.id AND vector.content_hash = text.content_hash
WHERE NOT text.blank AND vector.text_id IS NULL AND item.landed_hash IS NOT NULL
  AND NOT EXISTS (
      SELECT FROM embeddings.quarantine
      WHERE quarantine.collection = %(collection)s AND quarantine.fingerprint = %(fingerprint)s
        AND quarantine.content_hash = text.content_hash)
UNION
SELECT item.batch
FROM {item} AS item
WHERE item.landed_hash IS NOT NULL AND NOT EXISTS (SELECT FROM {text} AS text WHERE text.item_key = item.item_key)
