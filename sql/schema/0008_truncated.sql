-- Texts that are longer than a model reads, by content. Which of them are live is asked with a join.
CREATE TABLE embeddings.truncated (
    collection   text NOT NULL,
    fingerprint  text NOT NULL,
    content_hash bytea NOT NULL,
    tokens       bigint NOT NULL,                        -- with the prompt, before truncation
    noted_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (collection, fingerprint, content_hash),
    FOREIGN KEY (collection, fingerprint) REFERENCES embeddings.model ON DELETE CASCADE ON UPDATE CASCADE
);

-- Whether each of the model's texts that is too long is in embeddings.truncated: not those embedded before it was there.
ALTER TABLE embeddings.model ADD COLUMN lengths_known boolean NOT NULL DEFAULT true;
UPDATE embeddings.model SET lengths_known = false;
