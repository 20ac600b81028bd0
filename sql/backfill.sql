-- One model gets the vectors that it lacks, batch by batch.


-- name: wanted
-- Which of these batches a run keeps current for a shadow model: all, but for those that an open
-- model change's backfill has still to come to. Parameters: collection, fingerprint, batches.

SELECT batch.batch
FROM embeddings.batch
LEFT JOIN embeddings.backfill
  ON backfill.collection = batch.collection AND backfill.fingerprint = %(fingerprint)s AND backfill.batch = batch.batch
WHERE batch.collection = %(collection)s AND batch.batch = ANY (%(batches)s)
  AND (backfill.batch IS NOT NULL OR batch.committed_at IS NULL OR NOT EXISTS (
          SELECT FROM embeddings.model_change
          WHERE model_change.collection = batch.collection AND model_change.candidate_fingerprint = %(fingerprint)s
            AND model_change.phase = 'expanded'))
ORDER BY batch.batch


-- name: texts
-- The texts of a batch that are to have a vector; whether they have it in this model; and whether quarantine keeps them
-- from being tried now. OFFSET 0 and LIMIT 1: from the batch's rows on, each by its key, though the tables are new and the
-- planner knows nothing of them. Parameters: collection, fingerprint, batch, attempts, longest_text
-- (the longest wait of a text in quarantine).

SELECT
    text.id, text.item_key, text.vector_name, text.chunk, text.content_hash, text.text, vector.text_id IS NOT NULL,
    quarantine.content_hash IS NOT NULL
        AND (quarantine.attempts >= %(attempts)s
             OR quarantine.next_try > now() AND quarantine.next_try <= now() + %(longest_text)s::interval)
FROM {item} AS item
CROSS JOIN LATERAL (SELECT * FROM {text} AS text WHERE text.item_key = item.item_key AND NOT text.blank OFFSET 0) AS text
LEFT JOIN LATERAL (SELECT text_id FROM {written} AS vector WHERE vector.text_id = text.id LIMIT 1) AS vector ON true
LEFT JOIN embeddings.quarantine
  ON quarantine.collection = %(collection)s AND quarantine.fingerprint = %(fingerprint)s
 AND quarantine.content_hash = text.content_hash
WHERE item.batch = %(batch)s
ORDER BY text.id


-- name: lacking
-- Under the batches' locks: their texts without a vector in this model, and whether quarantine excuses them. OFFSET 0: from
-- the batches' rows on, each by its key, though the tables are new and the planner knows nothing of them.
-- Parameter: batches.

SELECT item.batch, lacking.text_id, lacking.content_hash, lacking.excused
FROM {item} AS item
CROSS JOIN LATERAL (
    SELECT * FROM {lacking} AS lacking WHERE lacking.item_key = item.item_key AND NOT lacking.stale OFFSET 0
) AS lacking
WHERE item.batch = ANY (%(batches)s)


-- name: mended
-- Texts of these batches that have a vector in this model now leave the quarantine when none of their kind lacks it.
-- Parameters: collection, fingerprint, batches.

DELETE FROM embeddings.quarantine
WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s
  AND content_hash IN (
      SELECT text.content_hash
      FROM {item} AS item JOIN {text} AS text USING (item_key)
      WHERE item.batch = ANY (%(batches)s))
  AND NOT EXISTS (
      SELECT FROM {lacking} AS lacking WHERE lacking.content_hash = quarantine.content_hash AND NOT lacking.stale)


-- name: done
-- Parameters: collection, fingerprint; batches, and for each complete, wrote, and file: of those that wrote nothing it
-- stays, if there is one.

INSERT INTO embeddings.backfill (collection, fingerprint, batch, complete, file)
SELECT %(collection)s, %(fingerprint)s, backfilled.batch, backfilled.complete,
       CASE WHEN backfilled.wrote THEN coalesce(backfilled.file, before.file) ELSE coalesce(before.file, backfilled.file) END
FROM unnest(%(batches)s::bigint[], %(complete)s::boolean[], %(wrote)s::boolean[], %(file)s::text[])
     AS backfilled (batch, complete, wrote, file)
LEFT JOIN embeddings.backfill AS before
  ON before.collection = %(collection)s AND before.fingerprint = %(fingerprint)s AND before.batch = backfilled.batch
ON CONFLICT (collection, fingerprint, batch) DO UPDATE SET complete = excluded.complete, file = excluded.file
