-- version: 6
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

-- What each model has of each batch. No row: nothing has landed, or an open migration has not come to the batch yet.
CREATE TABLE IF NOT EXISTS embeddings.fill (
    collection  text NOT NULL,
    fingerprint text NOT NULL,
    batch       bigint NOT NULL,
    complete    boolean NOT NULL,                        -- each text of the batch has its vector, or is in quarantine;
                                                         -- of the active model it is not asked: see embeddings.batch
    file        text,                                    -- the lake's file with the vectors
    PRIMARY KEY (collection, fingerprint, batch),
    FOREIGN KEY (collection, fingerprint) REFERENCES embeddings.model ON DELETE CASCADE
);

-- Changes of a collection's model, one open at a time.
CREATE TABLE IF NOT EXISTS embeddings.migration (
    id               bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    collection       text NOT NULL REFERENCES embeddings.collection ON DELETE CASCADE,
    from_fingerprint text NOT NULL,
    to_fingerprint   text NOT NULL,
    phase            text NOT NULL CHECK (phase IN ('expanded', 'swapped', 'contracted', 'abandoned')),
    expanded_at      timestamptz NOT NULL DEFAULT now(),
    swapped_at       timestamptz,
    ended_at         timestamptz,
    gate             jsonb,                              -- what the last check before a swap measured
    made_by_expand   boolean NOT NULL DEFAULT true       -- the next model's table; else `profile add` made it
);
CREATE UNIQUE INDEX IF NOT EXISTS migration_open ON embeddings.migration (collection)
    WHERE phase IN ('expanded', 'swapped');

-- For other programs: which model the view of a collection shows.
CREATE OR REPLACE FUNCTION embeddings.active_model(collection_name text)
RETURNS TABLE (profile text, fingerprint text, dimension bigint)
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT model.profile ->> 'name', model.fingerprint, model.dimension
    FROM embeddings.collection
    JOIN embeddings.model ON model.collection = collection.name AND model.fingerprint = collection.fingerprint
    WHERE collection.name = collection_name
$$;

-- For other programs, in the query itself: true, or an error with the code EMB01 where another model is the active one.
-- It asks the catalog, which is never older than the view that the query reads: the swap changes both at once.
CREATE OR REPLACE FUNCTION embeddings.assert_model(collection_name text, model_fingerprint text)
RETURNS boolean LANGUAGE plpgsql STABLE PARALLEL SAFE AS $$
BEGIN
    IF to_regclass(format('embeddings.%I', collection_name || '_active_' || model_fingerprint)) IS NULL THEN
        RAISE EXCEPTION 'collection %: model % is not the active one', collection_name, model_fingerprint
            USING ERRCODE = 'EMB01', HINT = 'Read embeddings.active_model() again, encode with that model, and retry.';
    END IF;
    RETURN true;
END $$;

-- From versions 1 to 5.
ALTER TABLE embeddings.scan ALTER COLUMN whole_scan_at DROP NOT NULL, ALTER COLUMN scanned DROP NOT NULL,
    ADD COLUMN IF NOT EXISTS watermark jsonb, ADD COLUMN IF NOT EXISTS read_at timestamptz;
ALTER TABLE embeddings.migration ADD COLUMN IF NOT EXISTS made_by_expand boolean NOT NULL DEFAULT true;
ALTER TABLE embeddings.quarantine ADD COLUMN IF NOT EXISTS next_try timestamptz NOT NULL DEFAULT now();
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_attribute
               WHERE attrelid = 'embeddings.batch'::regclass AND attname = 'file' AND NOT attisdropped) THEN
        INSERT INTO embeddings.fill (collection, fingerprint, batch, complete, file)
        SELECT batch.collection, collection.fingerprint, batch.batch, true, batch.file
        FROM embeddings.batch
        JOIN embeddings.collection ON collection.name = batch.collection
        WHERE batch.landed_at IS NOT NULL AND collection.fingerprint IS NOT NULL
        ON CONFLICT (collection, fingerprint, batch) DO UPDATE SET file = excluded.file;
        ALTER TABLE embeddings.batch DROP COLUMN file;
    END IF;
END $$;
DO $$
DECLARE collection_name text; active text;
BEGIN
    FOR collection_name, active IN SELECT name, fingerprint FROM embeddings.collection LOOP
        EXECUTE format('ALTER TABLE IF EXISTS embeddings.%I ADD COLUMN IF NOT EXISTS seen_at timestamptz',
                       collection_name || '_item');
        IF to_regclass(format('embeddings.%I', collection_name || '_text')) IS NOT NULL THEN
            EXECUTE format('CREATE INDEX IF NOT EXISTS %I ON embeddings.%I (content_hash)',
                           collection_name || '_text_hash', collection_name || '_text');
        END IF;
        IF active IS NOT NULL THEN
            EXECUTE format('CREATE TABLE IF NOT EXISTS embeddings.%I ()', collection_name || '_active_' || active);
        END IF;
    END LOOP;
END $$;
