-- Holds the collection's and the next model's rows, so that neither is changed meanwhile; no row where one just was.
-- Parameters: collection, from, to, made.

INSERT INTO embeddings.migration (collection, from_fingerprint, to_fingerprint, phase, made_by_expand)
SELECT collection.name, %(from)s, %(to)s, 'expanded', %(made)s
FROM embeddings.collection
JOIN embeddings.model ON model.collection = collection.name AND model.fingerprint = %(to)s
WHERE collection.name = %(collection)s AND collection.fingerprint = %(from)s
FOR SHARE
