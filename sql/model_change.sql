-- The phases of a model change.


-- name: begin
-- Holds the collection's and the next model's rows, so that neither is changed meanwhile; no row where one just was.
-- Parameters: collection, from, to, made.

INSERT INTO embeddings.model_change (collection, from_fingerprint, to_fingerprint, phase, made_by_expand)
SELECT collection.name, %(from)s, %(to)s, 'expanded', %(made)s
FROM embeddings.collection
JOIN embeddings.model ON model.collection = collection.name AND model.fingerprint = %(to)s
WHERE collection.name = %(collection)s AND collection.fingerprint = %(from)s
FOR SHARE


-- name: coverage
-- What a model lacks, from the data itself: texts, those without a vector of theirs, and those that have none and that
-- quarantine excuses. A batch that a commit has marked meanwhile is not counted among what lacks: it is backfilled before
-- the swap. Parameters: collection, fingerprint.

SELECT
    (SELECT count(*) FROM {text} AS text JOIN {item} AS item USING (item_key) WHERE NOT text.blank),
    count(*) FILTER (WHERE backfill.complete IS NOT FALSE),
    count(*) FILTER (WHERE backfill.complete IS NOT FALSE AND lacking.excused AND NOT lacking.stale)
FROM {lacking} AS lacking
JOIN {item} AS item USING (item_key)
LEFT JOIN embeddings.backfill
  ON backfill.collection = %(collection)s AND backfill.fingerprint = %(fingerprint)s AND backfill.batch = item.batch


-- name: flip
-- The swap begins: whoever commits with the former model waits here, and is rolled back. No row: it is not the current one.
-- Parameters: collection, from, to.

UPDATE embeddings.collection SET fingerprint = %(to)s, version = version + 1
WHERE name = %(collection)s AND fingerprint = %(from)s
RETURNING version


-- name: forget
-- The model's row, and by it where it is backfilled; and its quarantine. Parameters: collection, fingerprint.

WITH quarantined AS (
    DELETE FROM embeddings.quarantine WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s
)
DELETE FROM embeddings.model WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s


-- name: holds
-- Whether an open model change has this model, whose row is held from here on. Parameters: collection, fingerprint.

WITH held AS MATERIALIZED (
    SELECT FROM embeddings.model WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s FOR UPDATE
)
SELECT model_change.id
FROM embeddings.model_change, (SELECT count(*) FROM held) AS waited
WHERE collection = %(collection)s AND phase IN ('expanded', 'swapped')
  AND %(fingerprint)s IN (from_fingerprint, to_fingerprint)


-- name: incomplete
-- Batches that committed and that the next model is not whole in: none, or no swap. Parameters: collection, to.

SELECT batch.batch
FROM embeddings.batch
LEFT JOIN embeddings.backfill
  ON backfill.collection = batch.collection AND backfill.fingerprint = %(to)s AND backfill.batch = batch.batch
WHERE batch.collection = %(collection)s AND batch.committed_at IS NOT NULL AND NOT coalesce(backfill.complete, false)
ORDER BY batch.batch


-- name: marker
-- What embeddings.assert_model() looks for in the catalog. {marker}: the current model's; {next_marker}: its name from now on.

ALTER TABLE {marker} RENAME TO {next_marker}


-- name: model
-- A shadow model, kept current from now on. Parameters: collection, fingerprint, profile, dimension, storage.

INSERT INTO embeddings.model (collection, fingerprint, profile, dimension, storage)
VALUES (%(collection)s, %(fingerprint)s, %(profile)s, %(dimension)s, %(storage)s)
ON CONFLICT (collection, fingerprint) DO NOTHING


-- name: open
-- The open model change, and its two models as one statement sees them. Parameter: collection.

SELECT
    model_change.id, model_change.phase, model_change.expanded_at, model_change.swapped_at, model_change.gate, model_change.made_by_expand,
    former.fingerprint, former.dimension, former.storage, former.profile,
    next.fingerprint, next.dimension, next.storage, next.profile
FROM embeddings.model_change
JOIN embeddings.model AS former
  ON former.collection = model_change.collection AND former.fingerprint = model_change.from_fingerprint
JOIN embeddings.model AS next
  ON next.collection = model_change.collection AND next.fingerprint = model_change.to_fingerprint
WHERE model_change.collection = %(collection)s AND model_change.phase IN ('expanded', 'swapped')


-- name: progress
-- How far a shadow model is backfilled, in batches that are committed. Parameters: collection, fingerprint.

SELECT count(*), count(*) FILTER (WHERE backfill.complete)
FROM embeddings.batch
LEFT JOIN embeddings.backfill
  ON backfill.collection = batch.collection AND backfill.fingerprint = %(fingerprint)s AND backfill.batch = batch.batch
WHERE batch.collection = %(collection)s AND batch.committed_at IS NOT NULL


-- name: swapped
-- Into the next phase; no row where somebody else has gone on meanwhile. Parameters: id, from_phase, phase.

UPDATE embeddings.model_change
SET phase = %(phase)s,
    swapped_at = CASE WHEN %(phase)s = 'swapped' THEN now() ELSE swapped_at END,
    ended_at = CASE WHEN %(phase)s IN ('contracted', 'abandoned') THEN now() END
WHERE id = %(id)s AND phase = %(from_phase)s


-- name: to_encode
-- How many contents are to be encoded, equal ones of a batch once, and a sample of them. {lacking}: which texts have no
-- vector. Parameter: sample.

WITH wanted AS MATERIALIZED (
    SELECT item.batch, text.text
    FROM {text} AS text
    JOIN {item} AS item USING (item_key)
    WHERE NOT text.blank AND {lacking}
)
SELECT
    (SELECT count(*) FROM (SELECT DISTINCT batch, text FROM wanted) AS encoded),
    (SELECT array_agg(text) FROM (SELECT text FROM wanted ORDER BY random() LIMIT %(sample)s) AS sampled)


-- name: mark_lacking
-- Batches with a text that lacks its vector in this model, and that quarantine does not excuse, are not complete.
-- Parameters: collection, fingerprint.

UPDATE embeddings.backfill
SET complete = false
WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s AND complete
  AND batch IN (
      SELECT item.batch
      FROM {lacking} AS lacking
      JOIN {item} AS item USING (item_key)
      WHERE NOT lacking.stale AND NOT lacking.excused)
