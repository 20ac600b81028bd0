-- Texts that have a vector in this model now leave the quarantine when none of their kind lacks it.
-- Parameters: collection, fingerprint, content_hashes.

DELETE FROM embeddings.quarantine
WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s AND content_hash = ANY (%(content_hashes)s)
  AND NOT EXISTS (
      SELECT FROM {text} AS text
      WHERE text.content_hash = quarantine.content_hash AND NOT text.blank
        AND NOT EXISTS (SELECT FROM {vector} AS vector WHERE vector.text_id = text.id))
