-- Which of the numbered files in sql/schema/ the database has, and which pgvector. No placeholders.


-- name: create

CREATE SCHEMA IF NOT EXISTS embeddings;
CREATE TABLE IF NOT EXISTS embeddings.schema_migration (
    version    bigint PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
);


-- name: version

SELECT coalesce(max(version), 0) FROM embeddings.schema_migration


-- name: applied
-- Parameter: version.

INSERT INTO embeddings.schema_migration (version) VALUES (%(version)s)


-- name: older
-- Whether the schema is of a time before the numbered files.

SELECT to_regclass('embeddings.schema_version') IS NOT NULL


-- name: pgvector
-- The version of pgvector that this database has, and the one that its server could install; NULL if there is none.
-- Its schema, and whether this user may use that; and the schema that new things go to, NULL if the search path names
-- none.

SELECT extension.extversion AS installed, available.default_version AS available,
       schema.nspname AS schema, has_schema_privilege(schema.oid, 'USAGE') AS may_use,
       CASE WHEN current_schema !~ '^pg_' THEN current_schema END AS current_schema
FROM (SELECT) AS always
LEFT JOIN pg_extension AS extension ON extension.extname = 'vector'
LEFT JOIN pg_namespace AS schema ON schema.oid = extension.extnamespace
LEFT JOIN pg_available_extensions AS available ON available.name = 'vector'
