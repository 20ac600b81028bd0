-- The open migration. Parameter: collection.

SELECT id, from_fingerprint, to_fingerprint, phase, expanded_at, swapped_at, gate
FROM embeddings.migration
WHERE collection = %(collection)s AND phase IN ('expanded', 'swapped')
