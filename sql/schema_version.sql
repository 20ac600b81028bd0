-- Which version of schema.sql the database has, so that another version of this package can tell.

CREATE SCHEMA IF NOT EXISTS embeddings;

CREATE TABLE IF NOT EXISTS embeddings.schema_version (
    version    bigint NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);
