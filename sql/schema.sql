-- version: 3
-- The tables that all collections share. Idempotent; run when the stored version is older.

CREATE SCHEMA IF NOT EXISTS embeddings;

CREATE TABLE IF NOT EXISTS embeddings.collection (
    name            text PRIMARY KEY,
    fingerprint     text,                                -- the active model; NULL until the first run
    definition_hash bytea NOT NULL,
    version         bigint NOT NULL DEFAULT 0,           -- raised by each landing that changed a vector
    epoch           uuid NOT NULL DEFAULT gen_random_uuid(),
    last_batch      bigint NOT NULL DEFAULT 0,           -- the batch that new items go to …
    last_batch_size bigint NOT NULL DEFAULT 0            -- … until it holds `items_per_batch`
);

-- One row a model table: which vectors there are of a collection, and how they were made.
CREATE TABLE IF NOT EXISTS embeddings.model (
    collection  text NOT NULL REFERENCES embeddings.collection ON DELETE CASCADE,
    fingerprint text NOT NULL,
    profile     jsonb NOT NULL,
    dimension   bigint NOT NULL,
    storage     text NOT NULL CHECK (storage IN ('halfvec', 'vector')),
    created_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (collection, fingerprint)
);

CREATE TABLE IF NOT EXISTS embeddings.batch (
    collection      text NOT NULL REFERENCES embeddings.collection ON DELETE CASCADE,
    batch           bigint NOT NULL,
    definition_hash bytea,                               -- what the texts of every landed item were rendered with
    version         bigint,                              -- of the collection, at the last landing
    file            text,                                -- the run's file name in the lake that landed
    landed_at       timestamptz,
    attempts        bigint NOT NULL DEFAULT 0,           -- failures since the last landing
    next_try        timestamptz,
    PRIMARY KEY (collection, batch)
);

CREATE TABLE IF NOT EXISTS embeddings.scan (
    collection    text PRIMARY KEY REFERENCES embeddings.collection ON DELETE CASCADE,
    whole_scan_at timestamptz,                           -- when the last whole scan ended
    scanned       bigint,
    watermark     jsonb,                                 -- how far incremental scans have come; see store/ledger.py
    read_at       timestamptz                            -- when the last incremental scan wrote it
);

-- Texts that failed by themselves. Excused is exactly this content hash under this fingerprint.
CREATE TABLE IF NOT EXISTS embeddings.quarantine (
    collection   text NOT NULL REFERENCES embeddings.collection ON DELETE CASCADE,
    fingerprint  text NOT NULL,
    content_hash bytea NOT NULL,
    text         text NOT NULL,
    reason       text NOT NULL,
    attempts     bigint NOT NULL DEFAULT 1,
    last_try     timestamptz NOT NULL DEFAULT now(),
    next_try     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (collection, fingerprint, content_hash)
);

-- Texts whose vectors under a fingerprint are known, encoded again to see whether the model still gives the same.
CREATE TABLE IF NOT EXISTS embeddings.canary (
    fingerprint text NOT NULL,
    number      bigint NOT NULL,
    text        text NOT NULL,
    embedding   real[] NOT NULL,
    PRIMARY KEY (fingerprint, number)
);

-- From versions 1 and 2.
ALTER TABLE embeddings.scan ALTER COLUMN whole_scan_at DROP NOT NULL, ALTER COLUMN scanned DROP NOT NULL,
    ADD COLUMN IF NOT EXISTS watermark jsonb, ADD COLUMN IF NOT EXISTS read_at timestamptz;
ALTER TABLE embeddings.quarantine ADD COLUMN IF NOT EXISTS next_try timestamptz NOT NULL DEFAULT now();
DO $$
DECLARE collection_name text;
BEGIN
    FOR collection_name IN SELECT name FROM embeddings.collection LOOP
        EXECUTE format('ALTER TABLE IF EXISTS embeddings.%I ADD COLUMN IF NOT EXISTS seen_at timestamptz',
                       collection_name || '_item');
        IF to_regclass(format('embeddings.%I', collection_name || '_text')) IS NOT NULL THEN
            EXECUTE format('CREATE INDEX IF NOT EXISTS %I ON embeddings.%I (content_hash)',
                           collection_name || '_text_hash', collection_name || '_text');
        END IF;
    END LOOP;
END $$;
