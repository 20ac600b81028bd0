-- The batches that are not covered, the worst first. Parameters: collection, fingerprint, limit.

WITH uncovered AS (
    SELECT text.item_key
    FROM {text} AS text
    LEFT JOIN {written} AS vector ON vector.text_id = text.id AND vector.content_hash = text.content_hash
    WHERE NOT text.blank AND vector.text_id IS NULL
      AND NOT EXISTS (
          SELECT FROM embeddings.quarantine
          WHERE quarantine.collection = %(collection)s AND quarantine.fingerprint = %(fingerprint)s
            AND quarantine.content_hash = text.content_hash)
), counted AS (
    SELECT
        item.batch, count(*) AS items,
        count(*) FILTER (
            WHERE item.seen_hash IS DISTINCT FROM item.landed_hash
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
