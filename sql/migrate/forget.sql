-- The model's row, and by it where it is filled; and its quarantine. Parameters: collection, fingerprint.

WITH quarantined AS (
    DELETE FROM embeddings.quarantine WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s
)
DELETE FROM embeddings.model WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s
