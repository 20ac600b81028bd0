-- Parameters: collection, fingerprint, content_hash, text, reason.

INSERT INTO embeddings.quarantine (collection, fingerprint, content_hash, text, reason)
VALUES (%(collection)s, %(fingerprint)s, %(content_hash)s, %(text)s, %(reason)s)
ON CONFLICT (collection, fingerprint, content_hash) DO UPDATE
SET reason = excluded.reason, attempts = quarantine.attempts + 1, last_try = now()
