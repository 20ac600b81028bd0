-- The same under the batches' locks: texts without a vector in this model, and whether quarantine excuses them.
-- Parameters: collection, fingerprint, batches.

SELECT item.batch, text.id, text.content_hash, quarantine.content_hash IS NOT NULL
FROM {item} AS item
CROSS JOIN LATERAL (SELECT * FROM {text} AS text WHERE text.item_key = item.item_key AND NOT text.blank OFFSET 0) AS text
LEFT JOIN LATERAL (SELECT text_id FROM {written} AS vector WHERE vector.text_id = text.id LIMIT 1) AS vector ON true
LEFT JOIN embeddings.quarantine
  ON quarantine.collection = %(collection)s AND quarantine.fingerprint = %(fingerprint)s
 AND quarantine.content_hash = text.content_hash
WHERE item.batch = ANY (%(batches)s) AND vector.text_id IS NULL
