-- The same under the batch's lock: texts without a vector in this model, and whether quarantine excuses them.
-- Parameters: collection, fingerprint, batch.

SELECT text.id, text.content_hash, quarantine.content_hash IS NOT NULL
FROM {item} AS item
JOIN {text} AS text USING (item_key)
LEFT JOIN {written} AS vector ON vector.text_id = text.id
LEFT JOIN embeddings.quarantine
  ON quarantine.collection = %(collection)s AND quarantine.fingerprint = %(fingerprint)s
 AND quarantine.content_hash = text.content_hash
WHERE item.batch = %(batch)s AND NOT text.blank AND vector.text_id IS NULL
