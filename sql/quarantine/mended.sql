-- Texts of this landing leave the quarantine when none of their kind lacks its vector. Parameters: collection, fingerprint.

DELETE FROM embeddings.quarantine
USING (SELECT DISTINCT content_hash FROM landing_vector) AS made
WHERE quarantine.collection = %(collection)s AND quarantine.fingerprint = %(fingerprint)s
  AND quarantine.content_hash = made.content_hash
  AND NOT EXISTS (
      SELECT FROM {text} AS text
      WHERE text.content_hash = made.content_hash
        AND NOT EXISTS (SELECT FROM {written} AS vector WHERE vector.text_id = text.id))
