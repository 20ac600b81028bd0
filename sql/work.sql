-- What there is to do, derived from state (rule 1).
-- A next try that is further off than the longest wait counts as none: the clock was ahead when it was written.
-- Parameters of many: longest (the longest wait of a batch) and longest_text (of a text in quarantine).


-- name: dirty_batches
-- Batches with a dirty item, and batches whose texts were rendered with another definition than the collection's; and of
-- how many items. Parameters: collection, longest; due: without the batches that wait for their next try; free: without
-- the items that wait for a batch job, which were dirty when it was made.

WITH in_job AS MATERIALIZED (
    SELECT of.batch, max(job.made_at) AS made_at
    FROM embeddings.batch_job AS job
    JOIN embeddings.collection ON collection.name = job.collection AND collection.fingerprint = job.fingerprint
    CROSS JOIN LATERAL unnest(job.batches) AS of (batch)
    WHERE %(free)s AND job.collection = %(collection)s AND job.ended_at IS NULL
    GROUP BY of.batch
), other_definition AS MATERIALIZED (  -- else the items of every batch are counted first
    SELECT batch.batch
    FROM embeddings.batch
    JOIN embeddings.collection ON collection.name = batch.collection
    WHERE batch.collection = %(collection)s AND batch.definition_hash IS DISTINCT FROM collection.definition_hash
      AND NOT EXISTS (SELECT FROM in_job WHERE in_job.batch = batch.batch)
), dirty AS (
    SELECT batch, count(*) AS items
    FROM {item} LEFT JOIN in_job USING (batch)
    WHERE seen_hash IS DISTINCT FROM committed_hash AND (made_at IS NULL OR seen_at > made_at)
    GROUP BY batch
    UNION ALL
    SELECT batch, count(*) FROM other_definition JOIN {item} USING (batch) GROUP BY batch
)
SELECT dirty.batch, max(items)
FROM dirty
JOIN embeddings.batch ON batch.collection = %(collection)s AND batch.batch = dirty.batch
WHERE NOT (%(due)s AND coalesce(batch.next_try > now() AND batch.next_try <= now() + %(longest)s::interval, false))
GROUP BY dirty.batch
ORDER BY dirty.batch


-- name: dirty_since
-- Of these batches, those with an item that has been dirty since before a moment. Parameters: batches, moments (one each).

SELECT DISTINCT item.batch
FROM unnest(%(batches)s::bigint[], %(moments)s::timestamptz[]) AS of (batch, moment)
JOIN {item} AS item ON item.batch = of.batch AND item.seen_at <= of.moment
WHERE item.seen_hash IS DISTINCT FROM item.committed_hash
ORDER BY item.batch


-- name: incomplete_batches
-- Batches in which a shadow model lacks vectors, without those that an open model change's backfill has
-- not come to, that wait for their next try, or for a batch job. Parameters: collection, due, longest.

SELECT DISTINCT batch.batch
FROM embeddings.collection
JOIN embeddings.model ON model.collection = collection.name AND model.fingerprint <> collection.fingerprint
JOIN embeddings.batch ON batch.collection = collection.name AND batch.committed_at IS NOT NULL
LEFT JOIN embeddings.backfill
  ON backfill.collection = collection.name AND backfill.fingerprint = model.fingerprint AND backfill.batch = batch.batch
WHERE collection.name = %(collection)s
  AND NOT (%(due)s AND coalesce(batch.next_try > now() AND batch.next_try <= now() + %(longest)s::interval, false))
  AND NOT EXISTS (
      SELECT FROM embeddings.batch_job AS job
      WHERE job.collection = collection.name AND job.fingerprint = model.fingerprint AND job.ended_at IS NULL
        AND batch.batch = ANY (job.batches))
  AND CASE WHEN backfill.batch IS NOT NULL THEN NOT backfill.complete
           ELSE NOT EXISTS (
               SELECT FROM embeddings.model_change
               WHERE model_change.collection = collection.name AND model_change.candidate_fingerprint = model.fingerprint
                 AND model_change.phase = 'expanded') END
ORDER BY batch.batch


-- name: retries
-- The batches with a text whose time in quarantine is over and that has no vector yet, or with an item whose time there is
-- over; and how many such items.
-- Parameters: collection, fingerprint, attempts, longest, longest_text, and due: without the batches that wait for their
-- next try.

WITH due AS (
    SELECT lacking.item_key
    FROM embeddings.quarantine
    JOIN {lacking} AS lacking ON lacking.content_hash = quarantine.content_hash AND NOT lacking.stale
    WHERE quarantine.collection = %(collection)s AND quarantine.fingerprint = %(fingerprint)s
      AND quarantine.attempts < %(attempts)s
      AND NOT (quarantine.next_try > now() AND quarantine.next_try <= now() + %(longest_text)s::interval)
    UNION
    SELECT item_key
    FROM embeddings.quarantined_item
    WHERE collection = %(collection)s AND attempts < %(attempts)s
      AND NOT (next_try > now() AND next_try <= now() + %(longest_text)s::interval)
)
SELECT item.batch, count(*)
FROM due
JOIN {item} AS item USING (item_key)
JOIN embeddings.batch ON batch.collection = %(collection)s AND batch.batch = item.batch
WHERE NOT (%(due)s AND coalesce(batch.next_try > now() AND batch.next_try <= now() + %(longest)s::interval, false))
GROUP BY item.batch
ORDER BY item.batch


-- name: recent_items
-- Items first seen lately of which nothing is committed, the oldest first, without batches that wait for their next
-- try. Parameters: collection, days, limit, longest.

SELECT item.batch, item_key
FROM {item} AS item
JOIN embeddings.batch ON batch.collection = %(collection)s AND batch.batch = item.batch
WHERE committed_hash IS NULL AND seen_hash IS NOT NULL AND first_seen_at >= now() - interval '1 day' * %(days)s
  AND NOT coalesce(batch.next_try > now() AND batch.next_try <= now() + %(longest)s::interval, false)
ORDER BY first_seen_at, item_key
LIMIT %(limit)s


-- name: attempts
-- A batch that has been tried waits before it is tried again, twice as long each time. Its commit ends that. Within a
-- wait it is still the same attempt. Parameters: collection, batches, first and longest (waits).

UPDATE embeddings.batch
SET attempts = attempts + 1,
    next_try = now() + least(%(longest)s::interval, %(first)s::interval * 2 ^ least(attempts, 20))
WHERE collection = %(collection)s AND batch = ANY (%(batches)s::bigint[])
  AND NOT coalesce(next_try > now() AND next_try <= now() + %(longest)s::interval, false)


-- name: interrupted
-- Attempts that began within the last seconds, by what they wait for, do not count. Parameters: collection, first and
-- last (batch), seconds, first_wait and longest (wait).

UPDATE embeddings.batch
SET attempts = attempts - 1, next_try = CASE WHEN attempts > 1 THEN now() END
WHERE collection = %(collection)s AND batch BETWEEN %(first)s AND %(last)s AND attempts > 0
  AND next_try - least(%(longest)s::interval, %(first_wait)s::interval * 2 ^ least(attempts - 1, 20))
      > now() - interval '1 second' * %(seconds)s


-- name: failed
-- Why the last attempt at these batches failed; their commit ends that. Parameters: collection, batches, reason.

UPDATE embeddings.batch SET failure = %(reason)s
WHERE collection = %(collection)s AND batch = ANY (%(batches)s::bigint[]) AND attempts > 0
