-- The batch counts as rendered with this definition only where each of its landed items was: an item that was left
-- alone may still have texts of an older one. Parameters: collection, batch, definition_hash.

UPDATE embeddings.batch
SET definition_hash = CASE
        WHEN batch.definition_hash = %(definition_hash)s THEN batch.definition_hash
        WHEN EXISTS (SELECT FROM landing_decision
                     WHERE decision IN ('leave', 'vanished') AND landed_hash IS NOT NULL) THEN NULL
        ELSE %(definition_hash)s
    END,
    landed_at = now(), attempts = 0, next_try = NULL
WHERE collection = %(collection)s AND batch = %(batch)s
