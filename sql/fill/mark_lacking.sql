-- Batches with a text that lacks its vector in this model, and that quarantine does not excuse, are not complete.
-- Parameters: collection, fingerprint.

UPDATE embeddings.fill
SET complete = false
WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s AND complete
  AND batch IN (
      SELECT item.batch
      FROM {text} AS text
      JOIN {item} AS item USING (item_key)
      LEFT JOIN {written} AS vector ON vector.text_id = text.id
      WHERE NOT text.blank AND vector.text_id IS NULL
        AND NOT EXISTS (
            SELECT FROM embeddings.quarantine
            WHERE quarantine.collection = %(collection)s AND quarantine.fingerprint = %(fingerprint)s
              AND quarantine.content_hash = text.content_hash))
