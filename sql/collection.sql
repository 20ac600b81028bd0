-- The tables of one collection. {item} {text}: its tables; {item_batch} {item_dirty} {text_item} {text_hash}: their indexes.

CREATE TABLE IF NOT EXISTS {item} (
    item_key          text COLLATE "C" PRIMARY KEY,
    batch             bigint NOT NULL,
    seen_hash         bytea,                             -- row hash last seen in the source; NULL: gone
    landed_hash       bytea,                             -- row hash that the texts and vectors here were made from
    first_seen_at     timestamptz NOT NULL DEFAULT now(),
    seen_at           timestamptz,                       -- when `seen_hash` was last written: since then it is dirty
    payload           jsonb
);
CREATE INDEX IF NOT EXISTS {item_batch} ON {item} (batch);
-- Dirty items, and nothing else: deriving the work costs what there is to do, not what there is.
CREATE INDEX IF NOT EXISTS {item_dirty} ON {item} (batch) WHERE seen_hash IS DISTINCT FROM landed_hash;

CREATE TABLE IF NOT EXISTS {text} (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,   -- a changed text gets a new one
    item_key     text COLLATE "C" NOT NULL,
    vector_name  text COLLATE "C" NOT NULL,
    chunk        bigint NOT NULL,
    content_hash bytea NOT NULL,
    text         text NOT NULL,
    blank        boolean NOT NULL,
    CONSTRAINT {text_item} UNIQUE (item_key, vector_name, chunk)
);
CREATE INDEX IF NOT EXISTS {text_hash} ON {text} (content_hash);   -- the items that have a text of the quarantine
