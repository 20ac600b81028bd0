-- Batch jobs: files of texts that a server answers within a day, at a lower price (OpenAI's Batch API).

-- `preparing`: nothing was submitted. `uploaded`: it may have been. `submitted`: the server has it. `ended`: there, and what
-- it answered is to be fetched. Then, with `ended_at`: `done`, `failed` (nothing was answered) or `lost` (by the server).
CREATE TABLE embeddings.batch_job (
    id              text COLLATE "C" PRIMARY KEY,        -- ours; the server has it among what it says of the job
    collection      text NOT NULL REFERENCES embeddings.collection ON DELETE CASCADE ON UPDATE CASCADE,
    fingerprint     text COLLATE "C" NOT NULL,
    profile         jsonb NOT NULL,                      -- with which it was submitted; holds no key
    account         text COLLATE "C" NOT NULL,           -- tells keys and servers apart; holds no key
    batches         bigint[] NOT NULL,                   -- of the collection, whose texts it has
    state           text NOT NULL DEFAULT 'preparing'
                    CHECK (state IN ('preparing', 'uploaded', 'submitted', 'ended', 'done', 'failed', 'lost')),
    texts           bigint NOT NULL,
    tokens          bigint NOT NULL,                     -- as they are expected to be billed
    usd_per_million double precision,                    -- tokens; NULL: not known
    usd             double precision NOT NULL,           -- what it is expected to cost
    input_file      text,                                -- the server's names, from here on
    remote          text,
    remote_state    text,
    output_file     text,
    error_file      text,
    remote_done     bigint NOT NULL DEFAULT 0,           -- texts, as the server says
    answered        bigint NOT NULL DEFAULT 0,           -- texts whose vectors are in the cache
    refused         bigint NOT NULL DEFAULT 0,           -- texts that the server refuses: they are asked about one by one
    unanswered      bigint NOT NULL DEFAULT 0,           -- texts that it left: they are free again
    billed_tokens   bigint NOT NULL DEFAULT 0,
    billed_usd      double precision NOT NULL DEFAULT 0,
    reason          text,                                -- why it failed, or is not looked at
    made_at         timestamptz NOT NULL DEFAULT now(),
    asked_at        timestamptz,                         -- when the server was last asked to begin it
    submitted_at    timestamptz,
    looked_at       timestamptz,
    missing_since   timestamptz,                         -- the server says that there is no such job
    ended_at        timestamptz
);
CREATE INDEX batch_job_collection ON embeddings.batch_job (collection, ended_at);

-- A claim of a batch job has no lease: it counts until the text is answered or the job has ended. A text that the server
-- refused is anybody's, and is not submitted again.
ALTER TABLE embeddings.embedding_claim
    ADD COLUMN job text COLLATE "C" REFERENCES embeddings.batch_job ON DELETE CASCADE,
    ADD COLUMN tokens bigint NOT NULL DEFAULT 0,
    ADD COLUMN refused boolean NOT NULL DEFAULT false;
DROP INDEX embeddings.embedding_claim_collection;
CREATE INDEX embedding_claim_collection ON embeddings.embedding_claim (collection) WHERE job IS NULL;
