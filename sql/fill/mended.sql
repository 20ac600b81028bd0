-- Texts of these batches that have a vector in this model now leave the quarantine when none of their kind lacks it.
-- Parameters: collection, fingerprint, batches.

DELETE FROM embeddings.quarantine
WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s
  AND content_hash IN (
      SELECT text.content_hash
      FROM {item} AS item JOIN {text} AS text USING (item_key)
      WHERE item.batch = ANY (%(batches)s))
  AND NOT EXISTS (
      SELECT FROM {text} AS text
      WHERE text.content_hash = quarantine.content_hash AND NOT text.blank
        AND NOT EXISTS (SELECT FROM {written} AS vector WHERE vector.text_id = text.id))
