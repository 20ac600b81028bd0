-- The phases of a model change.


-- name: begin
-- Holds the collection's and the candidate's rows, so that neither is changed meanwhile; no row if one just was.
-- Parameters: collection, current, candidate, made.

INSERT INTO embeddings.model_change (collection, phase, current_fingerprint, candidate_fingerprint, made_by_expand)
SELECT collection.name, 'expanded', %(current)s, %(candidate)s, %(made)s
FROM embeddings.collection
JOIN embeddings.model ON model.collection = collection.name AND model.fingerprint = %(candidate)s
WHERE collection.name = %(collection)s AND collection.fingerprint = %(current)s
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


-- name: end
-- The change is over: contracted, or abandoned. No row if somebody else has gone on meanwhile.
-- Parameters: id, from_phase, phase.

UPDATE embeddings.model_change SET phase = %(phase)s, ended_at = now() WHERE id = %(id)s AND phase = %(from_phase)s


-- name: flip
-- Another model becomes the current one: whoever commits with the one that was waits here, and is rolled back. No row:
-- that was not the current one. Parameters: collection, current, shadow (the model that takes its place).

UPDATE embeddings.collection SET fingerprint = %(shadow)s, version = version + 1
WHERE name = %(collection)s AND fingerprint = %(current)s
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
  AND %(fingerprint)s IN (current_fingerprint, candidate_fingerprint, previous_fingerprint)


-- name: incomplete
-- Batches that committed and in which a shadow model lacks vectors: none, or no swap. Parameters: collection, shadow.

SELECT batch.batch
FROM embeddings.batch
LEFT JOIN embeddings.backfill
  ON backfill.collection = batch.collection AND backfill.fingerprint = %(shadow)s AND backfill.batch = batch.batch
WHERE batch.collection = %(collection)s AND batch.committed_at IS NOT NULL AND NOT coalesce(backfill.complete, false)
ORDER BY batch.batch


-- name: model
-- A shadow model, kept current from now on. Parameters: collection, fingerprint, profile, dimension, storage, identity.

INSERT INTO embeddings.model (collection, fingerprint, profile, dimension, storage, identity)
VALUES (%(collection)s, %(fingerprint)s, %(profile)s, %(dimension)s, %(storage)s, %(identity)s)
ON CONFLICT (collection, fingerprint) DO NOTHING


-- name: never_backfilled
-- How many batches the backfill has not come to. Parameters: collection, fingerprint.

SELECT count(*)
FROM embeddings.batch
LEFT JOIN embeddings.backfill
  ON backfill.collection = batch.collection AND backfill.fingerprint = %(fingerprint)s AND backfill.batch = batch.batch
WHERE batch.collection = %(collection)s AND batch.committed_at IS NOT NULL AND backfill.batch IS NULL


-- name: note_gate
-- Parameters: id, gate.

UPDATE embeddings.model_change SET gate = %(gate)s WHERE id = %(id)s


-- name: grace
-- Since when the grace period runs, and the time. If that is yet to come, the clock was ahead for a while, and it runs
-- from now on. Parameter: change.

WITH mended AS (
    UPDATE embeddings.model_change SET swapped_at = now() WHERE id = %(change)s AND swapped_at > now()
    RETURNING swapped_at
)
SELECT coalesce((SELECT swapped_at FROM mended), swapped_at), now()
FROM embeddings.model_change
WHERE id = %(change)s


-- name: open
-- The open model change, and its two models as one statement sees them; the shadow model is the candidate before the
-- swap, and the previous model after it. Parameter: collection.

SELECT
    model_change.id, model_change.phase, model_change.expanded_at, model_change.swapped_at, model_change.gate,
    model_change.made_by_expand,
    current.fingerprint, current.dimension, current.storage, current.profile,
    shadow.fingerprint, shadow.dimension, shadow.storage, shadow.profile
FROM embeddings.model_change
JOIN embeddings.model AS current
  ON current.collection = model_change.collection AND current.fingerprint = model_change.current_fingerprint
JOIN embeddings.model AS shadow
  ON shadow.collection = model_change.collection
 AND shadow.fingerprint = coalesce(model_change.candidate_fingerprint, model_change.previous_fingerprint)
WHERE model_change.collection = %(collection)s AND model_change.phase IN ('expanded', 'swapped')


-- name: progress
-- How far a shadow model is backfilled, in batches that are committed. Parameters: collection, fingerprint.

SELECT count(*), count(*) FILTER (WHERE backfill.complete)
FROM embeddings.batch
LEFT JOIN embeddings.backfill
  ON backfill.collection = batch.collection AND backfill.fingerprint = %(fingerprint)s AND backfill.batch = batch.batch
WHERE batch.collection = %(collection)s AND batch.committed_at IS NOT NULL


-- name: rolled_back
-- No row if somebody else has gone on meanwhile. Parameter: id.

UPDATE embeddings.model_change
SET phase = 'expanded', current_fingerprint = previous_fingerprint, candidate_fingerprint = current_fingerprint,
    previous_fingerprint = NULL
WHERE id = %(id)s AND phase = 'swapped'


-- name: swapped
-- No row if somebody else has gone on meanwhile. Parameter: id.

UPDATE embeddings.model_change
SET phase = 'swapped', current_fingerprint = candidate_fingerprint, candidate_fingerprint = NULL,
    previous_fingerprint = current_fingerprint, swapped_at = now()
WHERE id = %(id)s AND phase = 'expanded'


-- name: to_encode
-- The contents that are to be encoded, equal ones of a batch once. {wanted}: which texts.

SELECT DISTINCT item.batch, text.content_hash
FROM {text} AS text
JOIN {item} AS item USING (item_key)
WHERE NOT text.blank AND {wanted}
ORDER BY item.batch, text.content_hash


-- name: sample
-- One text of each of these contents. Parameter: content_hashes.

SELECT DISTINCT ON (content_hash) text FROM {text} WHERE content_hash = ANY (%(content_hashes)s) ORDER BY content_hash


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


-- name: texts_done
-- How many texts have their vector in a model, or are in quarantine, and how many are to have one.

SELECT texts - (SELECT count(*) FROM {lacking} WHERE NOT excused), texts
FROM (SELECT count(*) AS texts FROM {text} WHERE NOT blank) AS counted
