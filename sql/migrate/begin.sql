-- Holds both models' rows, so that neither is dropped meanwhile. Parameters: collection, from, to, made.

INSERT INTO embeddings.migration (collection, from_fingerprint, to_fingerprint, phase, made_by_expand)
SELECT collection, %(from)s, %(to)s, 'expanded', %(made)s
FROM embeddings.model
WHERE collection = %(collection)s AND fingerprint = %(to)s
FOR KEY SHARE
