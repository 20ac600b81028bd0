-- The tables of a collection, and a destination that is a table of our own: one a model.
-- {type}: halfvec(n) or vector(n); {bare_type}: without the dimension; {vector_storage}: PLAIN or EXTERNAL.
-- {index}, {method}, {operator_class}, {parameters}, {vector_name}: of an ANN index.


-- name: collection
-- The tables of one collection. {item} {text}: its tables; {item_batch} {item_dirty} {text_item} {text_hash}: their indexes.

CREATE TABLE IF NOT EXISTS {item} (
    item_key          text COLLATE "C" PRIMARY KEY,
    batch             bigint NOT NULL,
    seen_hash         bytea,                             -- row hash last seen in the source; NULL: gone
    committed_hash    bytea,                             -- row hash that the texts and vectors here were made from
    first_seen_at     timestamptz NOT NULL DEFAULT now(),
    seen_at           timestamptz NOT NULL DEFAULT now(),  -- since when it is dirty, if it is
    as_first_seen     boolean NOT NULL DEFAULT true,     -- false: seen otherwise since, or its vectors were doubted
    payload           jsonb
);
CREATE INDEX IF NOT EXISTS {item_batch} ON {item} (batch);
-- Dirty items, and nothing else: deriving the work costs what there is to do, not what there is.
CREATE INDEX IF NOT EXISTS {item_dirty} ON {item} (batch) WHERE seen_hash IS DISTINCT FROM committed_hash;

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


-- name: create
-- The vectors of one collection under one fingerprint. {vector}: the table; {type}: halfvec(n) or vector(n).

CREATE TABLE IF NOT EXISTS {vector} (
    text_id      bigint PRIMARY KEY,
    vector_name  text COLLATE "C" NOT NULL,
    content_hash bytea NOT NULL,
    embedding    {type} NOT NULL
)


-- name: set_storage
-- Out of TOAST a scan is several times faster; a row has to fit into a page for that.

ALTER TABLE {vector} ALTER COLUMN embedding SET STORAGE {vector_storage}


-- name: create_index
-- One ANN index a vector name: in an index over several names, filtering would starve the rare ones.

CREATE INDEX CONCURRENTLY {index} ON {vector}
USING {method} (embedding {operator_class}) WITH ({parameters})
WHERE vector_name = {vector_name}


-- name: indexes
-- The ANN indexes of a model table, built by us or not, valid or not. Parameter: table, its name in the schema embeddings.

SELECT
    named.relname                                   AS name,
    method.amname                                   AS method,
    coalesce(named.reloptions, '{}')                AS options,
    index.indisvalid AND index.indisready           AS valid,
    pg_get_expr(index.indpred, index.indrelid)      AS predicate,
    pg_relation_size(named.oid)                     AS bytes
FROM pg_index AS index
JOIN pg_class AS named ON named.oid = index.indexrelid
JOIN pg_am AS method ON method.oid = named.relam
WHERE index.indrelid = to_regclass(format('embeddings.%%I', %(table)s::text))
  AND method.amname IN ('hnsw', 'ivfflat')
ORDER BY named.relname


-- name: create_marker
-- {marker}: an empty table. With a primary key, as each of ours: in a publication FOR ALL TABLES nothing can be updated or
-- deleted in one without.

CREATE TABLE IF NOT EXISTS {marker} (fingerprint text PRIMARY KEY)


-- name: marker
-- What embeddings.assert_model() looks for in the catalog. {marker}: the current model's; {new_name}: its name from now on.

ALTER TABLE {marker} RENAME TO {new_name}


-- name: view
-- What people and other programs query: the current model's vectors. Without a dimension in the cast, so that
-- CREATE OR REPLACE can point it at a model of another dimension; with the vector table's own vector_name, so that a
-- condition on it finds the partial index.

CREATE OR REPLACE VIEW {view} AS
SELECT text.item_key, vector.vector_name, text.chunk, text.text, item.payload, vector.embedding::{bare_type} AS embedding
FROM {vector} AS vector
JOIN {text} AS text ON text.id = vector.text_id
JOIN {item} AS item ON item.item_key = text.item_key


-- name: written
-- Which of these texts have a vector, and of which content. Parameter: ids.

SELECT text_id, content_hash FROM {vector} WHERE text_id = ANY (%(ids)s::bigint[])


-- name: replaced
-- Vectors that a commit writes anew. Parameter: ids.

DELETE FROM {vector} WHERE text_id = ANY (%(ids)s::bigint[])


-- name: delete
-- A vector goes because its text went, never because a run happened not to encode it.

DELETE FROM {vector} AS vector USING commit_gone AS gone WHERE vector.text_id = gone.id


-- name: delete_unusable
-- Of a commit: vectors of zeros, as an earlier version stored them, of texts that are in quarantine since. {norm}: pgvector's
-- function for a length; {collection_name}, {model_fingerprint}: literals.

DELETE FROM {vector} AS vector
USING embeddings.quarantine, {text} AS text, commit_decision AS decided
WHERE quarantine.collection = {collection_name} AND quarantine.fingerprint = {model_fingerprint}
  AND text.content_hash = quarantine.content_hash AND vector.text_id = text.id AND {norm}(vector.embedding) = 0
  AND decided.item_key = text.item_key AND decided.decision = 'commit'


-- name: drop
DROP TABLE {vector}
