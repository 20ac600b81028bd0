-- Which definition of a collection is in force, and who has proposed which.

ALTER TABLE embeddings.collection ADD COLUMN outcome_hash bytea;  -- of the definition in force; NULL: not known yet

-- What each place (a file on a host) proposed last. A place whose file has not changed since does not propose again.
CREATE TABLE embeddings.proposed_definition (
    collection   text NOT NULL REFERENCES embeddings.collection ON DELETE CASCADE ON UPDATE CASCADE,
    place        text NOT NULL,
    outcome_hash bytea NOT NULL,
    proposed_at  timestamptz NOT NULL DEFAULT now(),
    aside        text,                                   -- why a process of that place last stepped aside …
    aside_at     timestamptz,                            -- … and when
    PRIMARY KEY (collection, place)
);
