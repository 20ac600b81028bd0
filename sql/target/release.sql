-- The user's column stays as it is.

DROP VIEW IF EXISTS {written};
DROP VIEW IF EXISTS {vector};
DROP TABLE IF EXISTS {hash}
