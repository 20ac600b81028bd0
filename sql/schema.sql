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


-- name: pgvector_versions

-- The version of pgvector that this database has, and the one that its server could install; NULL if there is none.
SELECT (SELECT extversion FROM pg_extension WHERE extname = 'vector') AS installed,
       (SELECT default_version FROM pg_available_extensions WHERE name = 'vector') AS available;
