-- Makes such items of one batch dirty, under its lock: nothing of them counts as landed.
-- Parameters: collection, fingerprint, batch.

UPDATE {item} AS item
SET landed_hash = NULL, seen_at = now()
WHERE item.batch = %(batch)s AND item.landed_hash IS NOT NULL AND item.seen_hash IS NOT NULL
  AND (NOT EXISTS (SELECT FROM {text} AS text WHERE text.item_key = item.item_key)
       OR EXISTS (
           SELECT
           FROM {text} AS text
           LEFT JOIN {written} AS vector ON vector.text_id = text.id AND vector.content_hash = text.content_hash
           WHERE text.item_key = item.item_key AND NOT text.blank AND vector.text_id IS NULL
             AND NOT EXISTS (
                 SELECT FROM embeddings.quarantine
                 WHERE quarantine.collection = %(collection)s AND quarantine.fingerprint = %(fingerprint)s
                   AND quarantine.content_hash = text.content_hash)))
