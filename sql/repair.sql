-- Items whose texts or vectors are not what is committed become dirty (rule 12).


-- name: damaged_batches
-- Batches in which a committed item lacks a vector that it should have, or has no texts though it is not in quarantine.
-- Parameter: collection.

SELECT item.batch
FROM {lacking} AS lacking
JOIN {item} AS item USING (item_key)
WHERE NOT lacking.excused AND item.committed_hash IS NOT NULL
UNION
SELECT item.batch
FROM {item} AS item
WHERE item.committed_hash IS NOT NULL AND NOT EXISTS (SELECT FROM {text} AS text WHERE text.item_key = item.item_key)
  AND item.item_key NOT IN (SELECT item_key FROM embeddings.quarantined_item WHERE collection = %(collection)s)


-- name: suspect
-- Makes such items of one batch dirty, under its lock: nothing of them counts as committed. Parameters: collection, batch.

UPDATE {item} AS item
SET committed_hash = NULL, seen_at = now(), as_first_seen = false
WHERE item.batch = %(batch)s AND item.committed_hash IS NOT NULL AND item.seen_hash IS NOT NULL
  AND (NOT EXISTS (SELECT FROM {text} AS text WHERE text.item_key = item.item_key)
       AND item.item_key NOT IN (SELECT item_key FROM embeddings.quarantined_item WHERE collection = %(collection)s)
       OR EXISTS (
           SELECT FROM {lacking} AS lacking WHERE lacking.item_key = item.item_key AND NOT lacking.excused))


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
