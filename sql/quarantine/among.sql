-- Which of these texts are in quarantine. Parameters: collection, fingerprint, content_hashes, attempts, and
-- waiting: only those that are not to be tried now.

SELECT content_hash
FROM embeddings.quarantine
WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s AND content_hash = ANY (%(content_hashes)b)
  AND NOT (%(waiting)s AND attempts < %(attempts)s AND next_try <= now())
