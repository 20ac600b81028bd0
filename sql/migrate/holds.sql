-- Whether an open migration has this model, whose row is held from here on. Parameters: collection, fingerprint.

WITH held AS MATERIALIZED (
    SELECT FROM embeddings.model WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s FOR UPDATE
)
SELECT migration.id
FROM embeddings.migration, (SELECT count(*) FROM held) AS waited
WHERE collection = %(collection)s AND phase IN ('expanded', 'swapped')
  AND %(fingerprint)s IN (from_fingerprint, to_fingerprint)
