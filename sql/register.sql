-- Parameters: collection, definition_hash.

INSERT INTO embeddings.collection (name, definition_hash)
VALUES (%(collection)s, %(definition_hash)s)
ON CONFLICT (name) DO UPDATE SET definition_hash = excluded.definition_hash
WHERE collection.definition_hash <> excluded.definition_hash
