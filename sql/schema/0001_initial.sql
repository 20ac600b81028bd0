-- The tables that all collections share.

CREATE TABLE embeddings.collection (
    name            text PRIMARY KEY,
    renamed_from    text,                                -- while a renaming is under way: the name before it
    fingerprint     text,                                -- the current model; NULL until the first run
    definition_hash bytea NOT NULL,
    version         bigint NOT NULL DEFAULT 0,           -- raised by each commit that changed a vector
    epoch           uuid NOT NULL DEFAULT gen_random_uuid(),
    last_batch      bigint NOT NULL DEFAULT 0,           -- the batch that new items go to …
    last_batch_size bigint NOT NULL DEFAULT 0            -- … until it holds `items_per_batch`
);

-- One row a model table: which vectors there are of a collection, and how they were made.
CREATE TABLE embeddings.model (
    collection  text NOT NULL REFERENCES embeddings.collection ON DELETE CASCADE ON UPDATE CASCADE,
    fingerprint text NOT NULL,
    profile     jsonb NOT NULL,
    dimension   bigint NOT NULL,
    storage     text NOT NULL CHECK (storage IN ('halfvec', 'vector')),
    identity    text,                                    -- of a user's column: the key, column and vector name that its
                                                         -- views were made for
    toast_tuple_target text,                             -- what it was of the user's table ('default', or bytes), while
                                                         -- a backfill has another; else NULL
    created_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (collection, fingerprint)
);

CREATE TABLE embeddings.batch (
    collection      text NOT NULL REFERENCES embeddings.collection ON DELETE CASCADE ON UPDATE CASCADE,
    batch           bigint NOT NULL,
    definition_hash bytea,                               -- what the texts of every committed item were rendered with
    version         bigint,                              -- of the collection, at the last commit
    committed_at    timestamptz,
    attempts        bigint NOT NULL DEFAULT 0,           -- failures since the last commit
    next_try        timestamptz,
    PRIMARY KEY (collection, batch)
);

CREATE TABLE embeddings.scan (
    collection    text PRIMARY KEY REFERENCES embeddings.collection ON DELETE CASCADE ON UPDATE CASCADE,
    full_scan_at  timestamptz,                           -- when the last full scan ended
    scanned       bigint,
    watermark     jsonb,                                 -- how far incremental scans have come: `Watermark`
    read_at       timestamptz                            -- when the last incremental scan wrote it
);

-- Poison texts. Excused is exactly this content hash under this fingerprint.
CREATE TABLE embeddings.quarantine (
    collection   text NOT NULL REFERENCES embeddings.collection ON DELETE CASCADE ON UPDATE CASCADE,
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
CREATE TABLE embeddings.canary (
    fingerprint text NOT NULL,
    number      bigint NOT NULL,
    text        text NOT NULL,
    embedding   real[] NOT NULL,
    PRIMARY KEY (fingerprint, number)
);

-- What each model has of each batch. No row: nothing is committed, or an open model change has not come to the batch yet.
CREATE TABLE embeddings.backfill (
    collection  text NOT NULL,
    fingerprint text NOT NULL,
    batch       bigint NOT NULL,
    complete    boolean NOT NULL,                        -- each text of the batch has its vector, or is in quarantine;
                                                         -- of the current model it is not asked: see embeddings.batch
    file        text,                                    -- the lake's file with the vectors
    PRIMARY KEY (collection, fingerprint, batch),
    FOREIGN KEY (collection, fingerprint) REFERENCES embeddings.model ON DELETE CASCADE ON UPDATE CASCADE
);

-- Changes of a collection's model, one open at a time.
CREATE TABLE embeddings.model_change (
    id               bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    collection       text NOT NULL REFERENCES embeddings.collection ON DELETE CASCADE ON UPDATE CASCADE,
    phase            text NOT NULL CHECK (phase IN ('expanded', 'swapped', 'contracted', 'abandoned')),
    current_fingerprint   text NOT NULL,
    candidate_fingerprint text CHECK ((candidate_fingerprint IS NULL) = (phase IN ('swapped', 'contracted'))),
    previous_fingerprint  text CHECK ((previous_fingerprint IS NULL) = (phase IN ('expanded', 'abandoned'))),
    expanded_at      timestamptz NOT NULL DEFAULT now(),
    swapped_at       timestamptz,
    ended_at         timestamptz,
    gate             jsonb,                              -- what the last check before a swap measured
    made_by_expand   boolean NOT NULL DEFAULT true       -- the candidate's place; else `profile add` made it
);
CREATE UNIQUE INDEX model_change_open ON embeddings.model_change (collection)
    WHERE phase IN ('expanded', 'swapped');

-- For other programs: which model the view of a collection shows.
CREATE OR REPLACE FUNCTION embeddings.current_model(collection_name text)
RETURNS TABLE (profile text, fingerprint text, dimension bigint)
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT model.profile ->> 'name', model.fingerprint, model.dimension
    FROM embeddings.collection
    JOIN embeddings.model ON model.collection = collection.name AND model.fingerprint = collection.fingerprint
    WHERE collection.name = collection_name
$$;

-- For other programs, in the query itself: true, or an error with the code EMB01 if another model is the current one.
-- It asks the catalog, which is never older than the view that the query reads: the swap changes both at once.
CREATE OR REPLACE FUNCTION embeddings.assert_model(collection_name text, model_fingerprint text)
RETURNS boolean LANGUAGE plpgsql STABLE PARALLEL SAFE AS $$
BEGIN
    IF to_regclass(format('embeddings.%I', collection_name || '_current_' || model_fingerprint)) IS NULL THEN
        RAISE EXCEPTION 'collection %: model % is not the current one', collection_name, model_fingerprint
            USING ERRCODE = 'EMB01', HINT = 'Read embeddings.current_model() again, encode with that model, and retry.';
    END IF;
    RETURN true;
END $$;
