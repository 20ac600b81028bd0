-- Items whose texts or vectors are not what is committed become dirty (rule 12).


-- name: damaged_batches
-- Batches in which a committed item lacks a vector that it should have. Parameters: collection, fingerprint.

SELECT DISTINCT item.batch
FROM {text} AS text
JOIN {item} AS item USING (item_key)
LEFT JOIN {written} AS vector ON vector.text_id = text.id AND vector.content_hash = text.content_hash
WHERE NOT text.blank AND vector.text_id IS NULL AND item.committed_hash IS NOT NULL
  AND NOT EXISTS (
      SELECT FROM embeddings.quarantine
      WHERE quarantine.collection = %(collection)s AND quarantine.fingerprint = %(fingerprint)s
        AND quarantine.content_hash = text.content_hash)
UNION
SELECT item.batch
FROM {item} AS item
WHERE item.committed_hash IS NOT NULL AND NOT EXISTS (SELECT FROM {text} AS text WHERE text.item_key = item.item_key)


-- name: suspect
-- Makes such items of one batch dirty, under its lock: nothing of them counts as committed.
-- Parameters: collection, fingerprint, batch.

UPDATE {item} AS item
SET committed_hash = NULL, seen_at = now()
WHERE item.batch = %(batch)s AND item.committed_hash IS NOT NULL AND item.seen_hash IS NOT NULL
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


-- name: orphans
-- Vectors without their text, and texts without their item. A commit deletes all in one transaction, so there are none
-- unless somebody else wrote.

WITH gone AS (
    DELETE FROM {text} AS text
    WHERE NOT EXISTS (SELECT FROM {item} AS item WHERE item.item_key = text.item_key)
    RETURNING text.id
)
DELETE FROM {hash} AS vector
WHERE vector.text_id IN (SELECT id FROM gone)
   OR NOT EXISTS (SELECT FROM {text} AS text WHERE text.id = vector.text_id)
