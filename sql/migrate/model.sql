-- A model beside the active one, kept current from now on. Parameters: collection, fingerprint, profile, dimension, storage.

INSERT INTO embeddings.model (collection, fingerprint, profile, dimension, storage)
VALUES (%(collection)s, %(fingerprint)s, %(profile)s, %(dimension)s, %(storage)s)
ON CONFLICT (collection, fingerprint) DO NOTHING
