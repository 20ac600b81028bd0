-- How well the vectors cover the items, from the data itself. Parameters: collection, fingerprint.
--   missing: items of which nothing has landed, or that lack a vector of one of their texts
--   stale:   items that have landed, but not as they were last seen, or rendered with another definition

WITH text_state AS (
    SELECT
        text.item_key,
        bool_or(NOT text.blank AND vector.text_id IS NULL AND quarantine.content_hash IS NULL) AS missing,
        bool_or(vector.content_hash <> text.content_hash) AS stale,
        count(*) FILTER (WHERE NOT text.blank AND vector.text_id IS NULL
                           AND quarantine.content_hash IS NOT NULL) AS quarantined
    FROM {text} AS text
    LEFT JOIN {written} AS vector ON vector.text_id = text.id
    LEFT JOIN embeddings.quarantine
      ON quarantine.collection = %(collection)s AND quarantine.fingerprint = %(fingerprint)s
     AND quarantine.content_hash = text.content_hash
    GROUP BY text.item_key
), item_state AS (
    SELECT
        item.landed_hash IS NULL OR text_state.item_key IS NULL OR text_state.missing AS missing,
        item.landed_hash IS NOT NULL AND (
            item.seen_hash IS DISTINCT FROM item.landed_hash OR text_state.stale
            OR batch.definition_hash IS DISTINCT FROM collection.definition_hash) AS stale,
        coalesce(text_state.quarantined, 0) AS quarantined
    FROM {item} AS item
    JOIN embeddings.collection ON collection.name = %(collection)s
    LEFT JOIN embeddings.batch ON batch.collection = %(collection)s AND batch.batch = item.batch
    LEFT JOIN text_state USING (item_key)
)
SELECT
    count(*) AS items,
    count(*) FILTER (WHERE missing) AS missing,
    count(*) FILTER (WHERE stale AND NOT missing) AS stale,
    coalesce(sum(quarantined), 0)::bigint AS quarantined,
    (SELECT count(*) FROM {written}) AS vectors,
    (SELECT count(*) FROM {written} AS vector
     WHERE NOT EXISTS (SELECT FROM {text} AS text WHERE text.id = vector.text_id))
  + (SELECT count(*) FROM {text} AS text
     WHERE NOT EXISTS (SELECT FROM {item} AS item WHERE item.item_key = text.item_key)) AS orphans
FROM item_state
