-- The vectors of one collection under one fingerprint. {vector}: the table; {type}: halfvec(n) or vector(n).

CREATE TABLE IF NOT EXISTS {vector} (
    text_id      bigint PRIMARY KEY,
    vector_name  text COLLATE "C" NOT NULL,
    content_hash bytea NOT NULL,
    embedding    {type} NOT NULL
);
-- Out of TOAST a scan is several times faster; a row has to fit into a page for that.
ALTER TABLE {vector} ALTER COLUMN embedding SET STORAGE {vector_storage};
