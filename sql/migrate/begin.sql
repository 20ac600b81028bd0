-- Parameters: collection, from, to.

INSERT INTO embeddings.migration (collection, from_fingerprint, to_fingerprint, phase)
VALUES (%(collection)s, %(from)s, %(to)s, 'expanded')
