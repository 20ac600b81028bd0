-- Poison texts, each excused under one fingerprint, and items that fail as a whole, under every model.


-- name: add
-- It is tried again later, each time after four times as long.
-- Parameters: collection, fingerprint, content_hash, text, step, reason, first and longest (waits).

INSERT INTO embeddings.quarantine (collection, fingerprint, content_hash, text, step, reason, next_try)
VALUES (%(collection)s, %(fingerprint)s, %(content_hash)s, %(text)s, %(step)s, %(reason)s, now() + %(first)s)
ON CONFLICT (collection, fingerprint, content_hash) DO UPDATE
SET step = excluded.step, reason = excluded.reason, attempts = quarantine.attempts + 1, last_try = now(),
    next_try = now() + least(%(longest)s::interval, %(first)s::interval * 4 ^ least(quarantine.attempts, 10))


-- name: add_items
-- Of a commit: the items that it found to fail as a whole. An attempt counts once the wait before it is over, and a row
-- that has changed begins anew. Parameters: collection, attempts, first and longest (waits).

INSERT INTO embeddings.quarantined_item AS item (collection, item_key, row_hash, step, reason, next_try)
SELECT %(collection)s, item_key, row_hash, step, reason, now() + %(first)s::interval
FROM commit_failed JOIN commit_decision USING (item_key)
WHERE decision = 'commit'
ON CONFLICT (collection, item_key) DO UPDATE
SET row_hash = excluded.row_hash, step = excluded.step, reason = excluded.reason, last_try = now(),
    attempts = CASE WHEN item.row_hash <> excluded.row_hash THEN 1 ELSE item.attempts + 1 END,
    next_try = now() + CASE WHEN item.row_hash <> excluded.row_hash THEN %(first)s::interval
                            ELSE least(%(longest)s::interval, %(first)s::interval * 4 ^ least(item.attempts, 10)) END
WHERE item.row_hash <> excluded.row_hash OR item.attempts < %(attempts)s
   AND NOT (item.next_try > now() AND item.next_try <= now() + %(longest)s::interval)


-- name: mended_items
-- Items of this commit that did not fail, or are gone, leave the quarantine. Parameter: collection.

DELETE FROM embeddings.quarantined_item AS item
USING commit_decision AS decided
WHERE item.collection = %(collection)s AND item.item_key = decided.item_key AND decided.decision IN ('commit', 'delete')
  AND NOT EXISTS (SELECT FROM commit_failed AS failed WHERE failed.item_key = item.item_key)


-- name: waiting_items
-- Items of batches that could not be stored, and are not to be tried now. Parameters: collection, batches, attempts,
-- longest (wait).

SELECT quarantined.item_key, quarantined.row_hash, quarantined.reason
FROM embeddings.quarantined_item AS quarantined
JOIN {item} AS item USING (item_key)
WHERE quarantined.collection = %(collection)s AND item.batch = ANY (%(batches)s) AND quarantined.step = 'store'
  AND (quarantined.attempts >= %(attempts)s
       OR quarantined.next_try > now() AND quarantined.next_try <= now() + %(longest)s::interval)


-- name: unreadable
-- The items whose rows could not be read, and the keys that no item can have. Parameter: collection.

SELECT item_key, row_hash, reason, step = 'read' AS is_item
FROM embeddings.quarantined_item
WHERE collection = %(collection)s AND step IN ('read', 'key')
ORDER BY item_key


-- name: replace_unusable
-- The keys that no item can have, as a full scan found them. Parameters: collection, item_keys, hashes, reasons.

WITH gone AS (
    DELETE FROM embeddings.quarantined_item
    WHERE collection = %(collection)s AND step = 'key' AND item_key <> ALL (%(item_keys)s::text[])
)
INSERT INTO embeddings.quarantined_item (collection, item_key, row_hash, step, reason)
SELECT %(collection)s, item_key, row_hash, 'key', reason
FROM unnest(%(item_keys)s::text[], %(hashes)s::bytea[], %(reasons)s::text[]) AS unusable (item_key, row_hash, reason)
ON CONFLICT (collection, item_key) DO UPDATE SET reason = excluded.reason, last_try = now()


-- name: among
-- Which of these texts are in quarantine. Parameters: collection, fingerprint, content_hashes, attempts, longest (wait),
-- and waiting: only those that are not to be tried now.

SELECT content_hash
FROM embeddings.quarantine
WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s AND content_hash = ANY (%(content_hashes)b)
  AND NOT (%(waiting)s AND attempts < %(attempts)s
           AND NOT (next_try > now() AND next_try <= now() + %(longest)s::interval))


-- name: any
-- A row if any text is in quarantine, which is quickly told. Parameters: collection, fingerprint.

SELECT 1 FROM embeddings.quarantine WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s LIMIT 1


-- name: batches
-- The batches with an item that has one of these texts. Parameters: collection, content_hashes (NULL: all).

SELECT DISTINCT item.batch
FROM embeddings.quarantine
JOIN {text} AS text ON text.content_hash = quarantine.content_hash
JOIN {item} AS item USING (item_key)
WHERE quarantine.collection = %(collection)s
  AND (%(content_hashes)s::bytea[] IS NULL OR quarantine.content_hash = ANY (%(content_hashes)s))
UNION
SELECT item.batch
FROM embeddings.quarantined_item AS quarantined
JOIN {item} AS item USING (item_key)
WHERE quarantined.collection = %(collection)s
  AND (%(content_hashes)s::bytea[] IS NULL OR quarantined.row_hash = ANY (%(content_hashes)s))
ORDER BY batch


-- name: clear
-- Parameters: collection, content_hashes (NULL: all), which may be row hashes of items. Texts and items.

WITH texts AS (
    DELETE FROM embeddings.quarantine
    WHERE collection = %(collection)s
      AND (%(content_hashes)s::bytea[] IS NULL OR content_hash = ANY (%(content_hashes)s))
    RETURNING 1
), items AS (
    DELETE FROM embeddings.quarantined_item
    WHERE collection = %(collection)s
      AND (%(content_hashes)s::bytea[] IS NULL OR row_hash = ANY (%(content_hashes)s))
    RETURNING 1
)
SELECT (SELECT count(*) FROM texts) + (SELECT count(*) FROM items)


-- name: list
-- What is in quarantine under a model, and the items that lack a vector because of it.
-- Parameters: collection, fingerprint, profile, attempts.

SELECT
    encode(quarantine.content_hash, 'hex'), min(lacking.item_key), count(DISTINCT lacking.item_key), quarantine.step,
    quarantine.reason, quarantine.attempts, quarantine.last_try,
    CASE WHEN quarantine.attempts < %(attempts)s THEN quarantine.next_try END, quarantine.text,
    %(profile)s::text
FROM embeddings.quarantine
LEFT JOIN {lacking} AS lacking ON lacking.content_hash = quarantine.content_hash AND NOT lacking.stale
WHERE quarantine.collection = %(collection)s AND quarantine.fingerprint = %(fingerprint)s
GROUP BY quarantine.collection, quarantine.fingerprint, quarantine.content_hash
ORDER BY quarantine.last_try DESC, quarantine.content_hash


-- name: list_items
-- Items that fail as a whole. Parameters: collection, attempts.

SELECT
    encode(row_hash, 'hex'), item_key, 1, step, reason, attempts, last_try,
    CASE WHEN attempts < %(attempts)s AND step <> 'key' THEN next_try END, '', NULL
FROM embeddings.quarantined_item
WHERE collection = %(collection)s
ORDER BY last_try DESC, item_key


-- name: retry
-- Parameters: collection, content_hashes (NULL: all), which may be row hashes of items. Texts and items.

WITH texts AS (
    UPDATE embeddings.quarantine SET attempts = 0, next_try = now()
    WHERE collection = %(collection)s
      AND (%(content_hashes)s::bytea[] IS NULL OR content_hash = ANY (%(content_hashes)s))
    RETURNING 1
), items AS (
    UPDATE embeddings.quarantined_item SET attempts = 0, next_try = now()
    WHERE collection = %(collection)s
      AND (%(content_hashes)s::bytea[] IS NULL OR row_hash = ANY (%(content_hashes)s))
    RETURNING 1
)
SELECT (SELECT count(*) FROM texts) + (SELECT count(*) FROM items)


-- name: suspect
-- Makes the items with one of these texts, or of these row hashes, dirty, under their batches' locks: nothing of them counts as committed.
-- Parameters: collection, content_hashes (NULL: all).

UPDATE {item} AS item
SET committed_hash = NULL, seen_at = now(), as_first_seen = false
FROM (
    SELECT text.item_key
    FROM {text} AS text
    JOIN embeddings.quarantine ON quarantine.content_hash = text.content_hash
    WHERE quarantine.collection = %(collection)s
      AND (%(content_hashes)s::bytea[] IS NULL OR quarantine.content_hash = ANY (%(content_hashes)s))
    UNION
    SELECT item_key
    FROM embeddings.quarantined_item
    WHERE collection = %(collection)s AND (%(content_hashes)s::bytea[] IS NULL OR row_hash = ANY (%(content_hashes)s))
) AS chosen
WHERE chosen.item_key = item.item_key AND item.seen_hash IS NOT NULL AND item.committed_hash IS NOT NULL


-- name: sweep
-- Forgets texts that no item has any more, and items that are not there any more; what was never one is a full scan's
-- to forget. Parameter: collection.

WITH items AS (
    DELETE FROM embeddings.quarantined_item AS quarantined
    WHERE collection = %(collection)s AND step <> 'key'
      AND NOT EXISTS (SELECT FROM {item} AS item WHERE item.item_key = quarantined.item_key)
)
DELETE FROM embeddings.quarantine
WHERE collection = %(collection)s
  AND NOT EXISTS (SELECT FROM {text} AS text WHERE text.content_hash = quarantine.content_hash)


-- name: look_again
-- Batches whose texts left the quarantine have to be looked at again. Parameters: collection, batches.

UPDATE embeddings.backfill SET complete = false
WHERE collection = %(collection)s AND batch = ANY (%(batches)s) AND complete
