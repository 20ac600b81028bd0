-- Vectors on their way into a column: see `AdoptedColumn.put`.

CREATE TEMPORARY TABLE fill_vector (
    text_id bigint PRIMARY KEY, vector_name text NOT NULL, content_hash bytea NOT NULL, embedding {type} NOT NULL
) ON COMMIT {on_commit}
