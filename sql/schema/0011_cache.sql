-- What models have answered, by content; which texts somebody is asking about; and what was billed.

-- `embedding` is as encoders/cache.py packs it: a checksum, then float16s.
CREATE TABLE embeddings.embedding_cache (
    fingerprint  text COLLATE "C" NOT NULL,
    content_hash bytea NOT NULL,
    embedding    bytea NOT NULL,
    written_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (fingerprint, content_hash)
) WITH (toast_tuple_target = 8160);                      -- beside its row, where it is read fastest, if a page holds it
ALTER TABLE embeddings.embedding_cache ALTER COLUMN embedding SET STORAGE EXTERNAL;
CREATE INDEX embedding_cache_written ON embeddings.embedding_cache USING brin (written_at);

-- A text that somebody is asking a model about. A claim counts until its lease ends, which its holder prolongs.
CREATE TABLE embeddings.embedding_claim (
    fingerprint  text COLLATE "C" NOT NULL,
    content_hash bytea NOT NULL,
    collection   text NOT NULL,                          -- whose budget it is of
    holder       text COLLATE "C" NOT NULL,
    usd          double precision NOT NULL DEFAULT 0,    -- what the answer is expected to cost
    until        timestamptz NOT NULL,
    PRIMARY KEY (fingerprint, content_hash)
);
CREATE INDEX embedding_claim_holder ON embeddings.embedding_claim (holder);
CREATE INDEX embedding_claim_collection ON embeddings.embedding_claim (collection);

-- What was billed, a row a day (UTC).
CREATE TABLE embeddings.embedding_spend (
    day         date NOT NULL,
    collection  text NOT NULL REFERENCES embeddings.collection ON DELETE CASCADE ON UPDATE CASCADE,
    account     text COLLATE "C" NOT NULL,               -- tells keys and servers apart; holds no key
    model       text COLLATE "C" NOT NULL,
    fingerprint text COLLATE "C" NOT NULL,
    answers     bigint NOT NULL DEFAULT 0,
    texts       bigint NOT NULL DEFAULT 0,
    tokens      bigint NOT NULL DEFAULT 0,               -- as the server says; counted here if it does not say
    unpriced    bigint NOT NULL DEFAULT 0,               -- of them, those for which no price was known
    usd         double precision NOT NULL DEFAULT 0,     -- of the others
    told        bigint NOT NULL DEFAULT 0,               -- tokens of answers whose server says how many
    counted     bigint NOT NULL DEFAULT 0,               -- how many were counted here for those
    PRIMARY KEY (day, collection, account, model, fingerprint)
);
