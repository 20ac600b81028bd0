-- Which step a poison text failed at; and items that fail as a whole, whatever the model: nothing of them is embedded.

ALTER TABLE embeddings.quarantine
    ADD COLUMN step text NOT NULL DEFAULT 'encode' CHECK (step IN ('encode', 'store'));

CREATE TABLE embeddings.quarantined_item (
    collection text NOT NULL REFERENCES embeddings.collection ON DELETE CASCADE ON UPDATE CASCADE,
    item_key   text COLLATE "C" NOT NULL,
    row_hash   bytea NOT NULL,                           -- of the row that failed: another row is tried at once
    step       text NOT NULL CHECK (step IN ('read', 'render', 'store')),
    reason     text NOT NULL,
    attempts   bigint NOT NULL DEFAULT 1,
    last_try   timestamptz NOT NULL DEFAULT now(),
    next_try   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (collection, item_key)
);
