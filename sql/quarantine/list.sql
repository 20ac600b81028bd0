-- What is in quarantine under a model, and the items that lack a vector because of it.
-- Parameters: collection, fingerprint, profile, attempts.

SELECT
    encode(quarantine.content_hash, 'hex'), min(text.item_key), count(DISTINCT text.item_key), quarantine.reason,
    quarantine.attempts, quarantine.last_try,
    CASE WHEN quarantine.attempts < %(attempts)s THEN quarantine.next_try END, quarantine.text,
    %(profile)s::text
FROM embeddings.quarantine
LEFT JOIN {text} AS text
  ON text.content_hash = quarantine.content_hash
 AND NOT EXISTS (SELECT FROM {written} AS vector WHERE vector.text_id = text.id)
WHERE quarantine.collection = %(collection)s AND quarantine.fingerprint = %(fingerprint)s
GROUP BY quarantine.collection, quarantine.fingerprint, quarantine.content_hash
ORDER BY quarantine.last_try DESC, quarantine.content_hash
