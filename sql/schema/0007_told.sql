-- What `status` and `sync` tell beside what the data itself says: what the checks found, what failed, who is at work.

-- What each check found last.
CREATE TABLE embeddings.check_result (
    collection  text NOT NULL REFERENCES embeddings.collection ON DELETE CASCADE ON UPDATE CASCADE,
    name        text NOT NULL,
    passed      boolean NOT NULL,
    severity    text NOT NULL CHECK (severity IN ('error', 'warning')),
    description text NOT NULL,
    checked_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (collection, name)
);

-- What was refused or failed, until the same step goes well.
CREATE TABLE embeddings.failure (
    collection text NOT NULL REFERENCES embeddings.collection ON DELETE CASCADE ON UPDATE CASCADE,
    step       text NOT NULL,
    reason     text NOT NULL,
    failed_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (collection, step)
);

-- Who is at work on a collection. A row counts while its session lock is held: see `run_lock`.
CREATE TABLE embeddings.activity (
    id          text NOT NULL,
    collection  text NOT NULL REFERENCES embeddings.collection ON DELETE CASCADE ON UPDATE CASCADE,
    what        text NOT NULL,
    who         text NOT NULL,
    started_at  timestamptz NOT NULL DEFAULT now(),
    phase       text NOT NULL DEFAULT 'at work',
    done        bigint NOT NULL DEFAULT 0,               -- texts
    total       bigint NOT NULL DEFAULT 0,               -- 0: not known
    PRIMARY KEY (id, collection)
);

ALTER TABLE embeddings.batch ADD COLUMN failure text;    -- of the last attempt; NULL once it is committed

-- Each collection has its own: `sync --force` of one renews what its vectors are compared with, and no other's.
ALTER TABLE embeddings.canary
    DROP CONSTRAINT canary_pkey,
    ADD COLUMN collection text REFERENCES embeddings.collection ON DELETE CASCADE ON UPDATE CASCADE;
INSERT INTO embeddings.canary (collection, fingerprint, number, text, embedding)
SELECT model.collection, fingerprint, canary.number, canary.text, canary.embedding
FROM embeddings.canary JOIN embeddings.model USING (fingerprint)
WHERE canary.collection IS NULL;
DELETE FROM embeddings.canary WHERE collection IS NULL;
ALTER TABLE embeddings.canary ADD PRIMARY KEY (collection, fingerprint, number);
