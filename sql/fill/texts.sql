-- The texts of a batch that are to have a vector; whether they have it in this model; and whether quarantine keeps them
-- from being tried now. OFFSET 0 and LIMIT 1: from the batch's rows on, each by its key, though the tables are new and the
-- planner knows nothing of them. Parameters: collection, fingerprint, batch, attempts.

SELECT
    text.id, text.item_key, text.vector_name, text.chunk, text.content_hash, text.text, vector.text_id IS NOT NULL,
    quarantine.content_hash IS NOT NULL AND NOT (quarantine.attempts < %(attempts)s AND quarantine.next_try <= now())
FROM {item} AS item
CROSS JOIN LATERAL (SELECT * FROM {text} AS text WHERE text.item_key = item.item_key AND NOT text.blank OFFSET 0) AS text
LEFT JOIN LATERAL (SELECT text_id FROM {written} AS vector WHERE vector.text_id = text.id LIMIT 1) AS vector ON true
LEFT JOIN embeddings.quarantine
  ON quarantine.collection = %(collection)s AND quarantine.fingerprint = %(fingerprint)s
 AND quarantine.content_hash = text.content_hash
WHERE item.batch = %(batch)s
ORDER BY text.id
