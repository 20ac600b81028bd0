-- The open migration, and its two models as one statement sees them. Parameter: collection.

SELECT
    migration.id, migration.phase, migration.expanded_at, migration.swapped_at, migration.gate, migration.made_by_expand,
    former.fingerprint, former.dimension, former.storage, former.profile,
    next.fingerprint, next.dimension, next.storage, next.profile
FROM embeddings.migration
JOIN embeddings.model AS former
  ON former.collection = migration.collection AND former.fingerprint = migration.from_fingerprint
JOIN embeddings.model AS next
  ON next.collection = migration.collection AND next.fingerprint = migration.to_fingerprint
WHERE migration.collection = %(collection)s AND migration.phase IN ('expanded', 'swapped')
