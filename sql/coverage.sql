-- How well the vectors cover the source, counted in the data itself (rule 12).
-- Placeholders: {item} and {text}, the collection's tables; {vector}, the model's vectors; {written}, the relation that
-- says which texts have theirs; {lacking}, the view of those that lack it; {norm}, pgvector's function for a length.


-- name: items
-- How well the vectors cover the items, from the data itself. Parameter: collection.
--   missing: items of which nothing is committed, or that lack a vector of one of their texts. What quarantine excuses is
--            counted by itself: texts; items that failed as a whole, and rows that are none for their keys
--   stale:   items that are committed, but not as they were last seen, or rendered with another definition
--   damaged: of both, those that are not dirty

WITH lacks AS (
    SELECT
        item_key,
        bool_or(NOT stale AND NOT excused) AS missing,
        bool_or(stale) AS stale,
        count(*) FILTER (WHERE NOT stale AND excused) AS quarantined
    FROM {lacking}
    GROUP BY item_key
), item_state AS (
    SELECT
        item.committed_hash IS NULL OR coalesce(lacks.missing, false)
            OR quarantined.item_key IS NULL
               AND NOT EXISTS (SELECT FROM {text} AS text WHERE text.item_key = item.item_key) AS missing,
        item.committed_hash IS NOT NULL AND (
            item.seen_hash IS DISTINCT FROM item.committed_hash OR lacks.stale
            OR batch.definition_hash IS DISTINCT FROM collection.definition_hash) AS stale,
        item.seen_hash IS DISTINCT FROM item.committed_hash
            OR batch.definition_hash IS DISTINCT FROM collection.definition_hash AS dirty,
        coalesce(lacks.quarantined, 0) AS quarantined,
        quarantined.item_key IS NOT NULL AS quarantined_whole
    FROM {item} AS item
    JOIN embeddings.collection ON collection.name = %(collection)s
    LEFT JOIN embeddings.batch ON batch.collection = %(collection)s AND batch.batch = item.batch
    LEFT JOIN lacks USING (item_key)
    LEFT JOIN embeddings.quarantined_item AS quarantined
      ON quarantined.collection = %(collection)s AND quarantined.item_key = item.item_key
)
SELECT
    count(*) AS items,
    count(*) FILTER (WHERE missing) AS missing,
    count(*) FILTER (WHERE stale AND NOT missing) AS stale,
    coalesce(sum(quarantined), 0)::bigint AS quarantined,
    count(*) FILTER (WHERE quarantined_whole) + (
        SELECT count(*) FROM embeddings.quarantined_item WHERE collection = %(collection)s AND step = 'key'
    ) AS quarantined_items,
    (SELECT count(*) FROM {written}) AS vectors,
    (SELECT count(*) FROM {written} AS vector
     WHERE NOT EXISTS (SELECT FROM {text} AS text WHERE text.id = vector.text_id))
  + (SELECT count(*) FROM {text} AS text
     WHERE NOT EXISTS (SELECT FROM {item} AS item WHERE item.item_key = text.item_key)) AS orphans,
    count(*) FILTER (WHERE (missing OR stale) AND NOT dirty) AS damaged
FROM item_state


-- name: batches
-- The batches that are not covered, the worst first. Parameters: collection, limit.

WITH uncovered AS (
    SELECT item_key FROM {lacking} WHERE NOT excused
), counted AS (
    SELECT
        item.batch, count(*) AS items,
        count(*) FILTER (
            WHERE item.seen_hash IS DISTINCT FROM item.committed_hash
               OR batch.definition_hash IS DISTINCT FROM collection.definition_hash
               OR item.item_key IN (SELECT item_key FROM uncovered)) AS not_covered,
        batch.attempts, to_char(batch.next_try, 'YYYY-MM-DD HH24:MI TZ') AS next_try
    FROM {item} AS item
    JOIN embeddings.collection ON collection.name = %(collection)s
    LEFT JOIN embeddings.batch ON batch.collection = %(collection)s AND batch.batch = item.batch
    GROUP BY item.batch, batch.attempts, batch.next_try
)
SELECT to_char(batch, 'FM000000'), items, not_covered, coalesce(attempts, 0), coalesce(next_try, '')
FROM counted
WHERE not_covered > 0
ORDER BY not_covered DESC, batch
LIMIT %(limit)s


-- name: freshness
-- Since when the longest-waiting change has waited, when the source was last read, and the time. What is yet to come
-- counts as none: the clock was ahead for a while. Parameter: collection.

SELECT
    (SELECT min(seen_at) FROM {item} WHERE seen_hash IS DISTINCT FROM committed_hash AND seen_at <= now()),
    CASE WHEN scan.full_scan_at <= now() THEN scan.full_scan_at END,
    CASE WHEN scan.read_at <= now() THEN scan.read_at END,
    now()
FROM embeddings.collection
LEFT JOIN embeddings.scan ON scan.collection = collection.name
WHERE collection.name = %(collection)s


-- name: integrity
-- Vectors that cannot be right. Parameters: dimension, normalized, tolerance.
-- Stored values are always finite (pgvector refuses others on the way in); a length that is not, or is zero, says otherwise.

WITH measured AS (
    SELECT vector_dims(embedding) AS dimension, {norm}(embedding) AS length, content_hash, embedding FROM {vector}
), first AS (
    SELECT content_hash, embedding FROM {vector} ORDER BY text_id LIMIT 1
)
SELECT
    count(*),
    count(*) FILTER (WHERE dimension <> %(dimension)s),
    count(*) FILTER (WHERE length IS NULL OR length = 0 OR length = 'NaN' OR length = 'Infinity'),
    count(*) FILTER (WHERE %(normalized)s AND abs(length - 1) > %(tolerance)s),
    count(DISTINCT measured.content_hash) > 1 AND bool_and(measured.embedding = (SELECT embedding FROM first))
FROM measured
