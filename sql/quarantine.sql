-- Poison texts: each is excused under one fingerprint.


-- name: add
-- It is tried again later, each time after four times as long.
-- Parameters: collection, fingerprint, content_hash, text, reason, first and longest (waits).

INSERT INTO embeddings.quarantine (collection, fingerprint, content_hash, text, reason, next_try)
VALUES (%(collection)s, %(fingerprint)s, %(content_hash)s, %(text)s, %(reason)s, now() + %(first)s)
ON CONFLICT (collection, fingerprint, content_hash) DO UPDATE
SET reason = excluded.reason, attempts = quarantine.attempts + 1, last_try = now(),
    next_try = now() + least(%(longest)s::interval, %(first)s::interval * 4 ^ least(quarantine.attempts, 10))


-- name: among
-- Which of these texts are in quarantine. Parameters: collection, fingerprint, content_hashes, attempts, longest (wait),
-- and waiting: only those that are not to be tried now.

SELECT content_hash
FROM embeddings.quarantine
WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s AND content_hash = ANY (%(content_hashes)b)
  AND NOT (%(waiting)s AND attempts < %(attempts)s
           AND NOT (next_try > now() AND next_try <= now() + %(longest)s::interval))


-- name: batches
-- The batches with an item that has one of these texts. Parameters: collection, content_hashes (NULL: all).

SELECT DISTINCT item.batch
FROM embeddings.quarantine
JOIN {text} AS text ON text.content_hash = quarantine.content_hash
JOIN {item} AS item USING (item_key)
WHERE quarantine.collection = %(collection)s
  AND (%(content_hashes)s::bytea[] IS NULL OR quarantine.content_hash = ANY (%(content_hashes)s))
ORDER BY item.batch


-- name: clear
-- Parameters: collection, content_hashes (NULL: all).

DELETE FROM embeddings.quarantine
WHERE collection = %(collection)s
  AND (%(content_hashes)s::bytea[] IS NULL OR content_hash = ANY (%(content_hashes)s))


-- name: list
-- What is in quarantine under a model, and the items that lack a vector because of it.
-- Parameters: collection, fingerprint, profile, attempts.

SELECT
    encode(quarantine.content_hash, 'hex'), min(lacking.item_key), count(DISTINCT lacking.item_key), quarantine.reason,
    quarantine.attempts, quarantine.last_try,
    CASE WHEN quarantine.attempts < %(attempts)s THEN quarantine.next_try END, quarantine.text,
    %(profile)s::text
FROM embeddings.quarantine
LEFT JOIN {lacking} AS lacking ON lacking.content_hash = quarantine.content_hash AND NOT lacking.stale
WHERE quarantine.collection = %(collection)s AND quarantine.fingerprint = %(fingerprint)s
GROUP BY quarantine.collection, quarantine.fingerprint, quarantine.content_hash
ORDER BY quarantine.last_try DESC, quarantine.content_hash


-- name: retry
-- Parameters: collection, content_hashes (NULL: all).

UPDATE embeddings.quarantine
SET attempts = 0, next_try = now()
WHERE collection = %(collection)s
  AND (%(content_hashes)s::bytea[] IS NULL OR content_hash = ANY (%(content_hashes)s))


-- name: suspect
-- Makes the items with one of these texts dirty, under their batches' locks: nothing of them counts as committed.
-- Parameters: collection, content_hashes (NULL: all).

UPDATE {item} AS item
SET committed_hash = NULL, seen_at = now(), as_first_seen = false
FROM {text} AS text
JOIN embeddings.quarantine ON quarantine.content_hash = text.content_hash
WHERE text.item_key = item.item_key AND item.seen_hash IS NOT NULL AND item.committed_hash IS NOT NULL
  AND quarantine.collection = %(collection)s
  AND (%(content_hashes)s::bytea[] IS NULL OR quarantine.content_hash = ANY (%(content_hashes)s))


-- name: sweep
-- Forgets texts that no item has any more. Parameter: collection.

DELETE FROM embeddings.quarantine
WHERE collection = %(collection)s
  AND NOT EXISTS (SELECT FROM {text} AS text WHERE text.content_hash = quarantine.content_hash)


-- name: look_again
-- Batches whose texts left the quarantine have to be looked at again. Parameters: collection, batches.

UPDATE embeddings.backfill SET complete = false
WHERE collection = %(collection)s AND batch = ANY (%(batches)s) AND complete
