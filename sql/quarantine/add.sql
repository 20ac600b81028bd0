-- Tried again after 10 minutes, then 40, 160 …, at most a day later.
-- Parameters: collection, fingerprint, content_hash, text, reason.

INSERT INTO embeddings.quarantine (collection, fingerprint, content_hash, text, reason, next_try)
VALUES (%(collection)s, %(fingerprint)s, %(content_hash)s, %(text)s, %(reason)s, now() + interval '10 minutes')
ON CONFLICT (collection, fingerprint, content_hash) DO UPDATE
SET reason = excluded.reason, attempts = quarantine.attempts + 1, last_try = now(),
    next_try = now() + least(interval '1 day', interval '10 minutes' * 4 ^ least(quarantine.attempts, 6))
