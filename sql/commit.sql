-- The commit of batches: one transaction, under their locks (rules 3 to 5).
-- The statements are in the order in which they are executed.
-- Placeholders: {item} and {text}, the collection's tables; {lacking}, the view that says which texts lack their vector
-- under the model that commits; {text_name}: the table of texts, as a literal.


-- name: is_staged
-- Whether this session has made its tables.

SELECT to_regclass('pg_temp.commit_gone') IS NOT NULL


-- name: stage
-- What one run has for the items of batches, for one transaction of this session; texts and vectors go to their tables at once.
-- The tables stay, since making them takes longer than filling them, and are empty after each. They have no indexes: all
-- of each is joined.

CREATE TEMPORARY TABLE commit_item (        -- items of which every text is embedded, quarantined or blank; or that failed
    item_key text COLLATE "C" NOT NULL, encoded_hash bytea NOT NULL, payload jsonb
) ON COMMIT DELETE ROWS;
CREATE TEMPORARY TABLE commit_failed (      -- of these, the items that failed as a whole, and have no texts
    item_key text COLLATE "C" NOT NULL, row_hash bytea NOT NULL, step text NOT NULL, reason text NOT NULL
) ON COMMIT DELETE ROWS;
CREATE TEMPORARY TABLE commit_now (         -- the source, looked at again under the batch's lock
    item_key text COLLATE "C" NOT NULL, current_hash bytea NOT NULL
) ON COMMIT DELETE ROWS;
CREATE TEMPORARY TABLE commit_decision (    -- of each item of the batch; other_payload: than is committed
    batch bigint NOT NULL, item_key text COLLATE "C" NOT NULL, committed_hash bytea, encoded_hash bytea, current_hash bytea,
    other_payload boolean NOT NULL, decision text NOT NULL
) ON COMMIT DELETE ROWS;
CREATE TEMPORARY TABLE commit_gone (id bigint NOT NULL, item_key text COLLATE "C" NOT NULL) ON COMMIT DELETE ROWS;


-- name: keys
-- The batches' items, to look at again. Parameter: batches.

SELECT item_key FROM {item} WHERE batch = ANY (%(batches)s) ORDER BY batch, item_key


-- name: decide
-- Rule 3, an item at a time. Items that came into a batch since its keys were read are not looked at.
-- Parameters: batches, item_keys.
--   delete:   gone, and a scan said so (or nothing of it is committed)
--   vanished: gone, but no scan has said so yet: a scan decides, which refuses to wipe
--   leave:    not encoded by this run, or committed with the current hash while this run encoded another
--   commit:   what this run encoded goes in, also that the item failed: then its texts and vectors go

INSERT INTO commit_decision
SELECT
    item.batch, item.item_key, item.committed_hash, encoded.encoded_hash, now.current_hash,
    encoded.payload IS DISTINCT FROM item.payload,
    CASE
        WHEN now.item_key IS NULL AND (item.seen_hash IS NULL OR item.committed_hash IS NULL) THEN 'delete'
        WHEN now.item_key IS NULL THEN 'vanished'
        WHEN encoded.item_key IS NULL THEN 'leave'
        WHEN encoded.encoded_hash <> now.current_hash AND item.committed_hash = now.current_hash THEN 'leave'
        ELSE 'commit'
    END AS decision
FROM {item} AS item
LEFT JOIN commit_now AS now USING (item_key)
LEFT JOIN commit_item AS encoded USING (item_key)
WHERE item.batch = ANY (%(batches)s) AND item.item_key = ANY (%(item_keys)s::text[])


-- name: left_out
-- What this run has of items that are not committed after all.

SELECT item_key
FROM commit_item
LEFT JOIN commit_decision AS decided USING (item_key)
WHERE decided.decision IS DISTINCT FROM 'commit'


-- name: texts_before
-- The texts that are there of the items that are committed or deleted.

SELECT decided.batch, text.id, text.item_key, text.vector_name, text.chunk, text.content_hash
FROM commit_decision AS decided
JOIN {text} AS text USING (item_key)
WHERE decided.decision IN ('commit', 'delete')


-- name: gone_texts
-- Texts that are no longer expected: of deleted items, and those that the run rendered otherwise or not at all.
-- Parameter: ids.

WITH gone AS (
    DELETE FROM {text} AS text WHERE id = ANY (%(ids)s::bigint[]) RETURNING id, item_key
)
INSERT INTO commit_gone SELECT id, item_key FROM gone


-- name: new_ids
-- Ids of texts that are not there yet. Parameter: number.

SELECT nextval(own.sequence)
FROM (SELECT pg_get_serial_sequence({text_name}, 'id')::regclass AS sequence OFFSET 0) AS own,
    generate_series(1, %(number)s::bigint)


-- name: mark_shadows
-- Shadow models lack the new texts of this batch, until they are backfilled. A batch that an open
-- migration has not come to yet stays without a row. Parameters: collection, batch, fingerprint, new_texts.

INSERT INTO embeddings.backfill (collection, fingerprint, batch, complete)
SELECT model.collection, model.fingerprint, batch.batch, %(new_texts)s = 0
FROM embeddings.model
JOIN embeddings.batch ON batch.collection = model.collection AND batch.batch = %(batch)s
LEFT JOIN embeddings.backfill
  ON backfill.collection = model.collection AND backfill.fingerprint = model.fingerprint AND backfill.batch = batch.batch
WHERE model.collection = %(collection)s AND model.fingerprint <> %(fingerprint)s
  AND (backfill.batch IS NOT NULL OR batch.committed_at IS NULL)
ON CONFLICT (collection, fingerprint, batch) DO UPDATE SET complete = backfill.complete AND excluded.complete


-- name: mended
-- Texts of this commit leave the quarantine when none of their kind lacks its vector. Parameters: collection, fingerprint,
-- content_hashes.

DELETE FROM embeddings.quarantine
WHERE quarantine.collection = %(collection)s AND quarantine.fingerprint = %(fingerprint)s
  AND quarantine.content_hash = ANY (%(content_hashes)s)
  AND NOT EXISTS (
      SELECT FROM {lacking} AS lacking WHERE lacking.content_hash = quarantine.content_hash AND NOT lacking.stale)


-- name: count
-- The numbers that a commit reports, in items of each batch: deleted, left, quarantined, inserted, updated, unchanged.

SELECT
    batch,
    count(*) FILTER (WHERE decision = 'delete' AND committed_hash IS NOT NULL),
    count(*) FILTER (WHERE decision IN ('leave', 'vanished')),
    count(*) FILTER (WHERE decision = 'commit' AND failed),
    count(*) FILTER (WHERE decision = 'commit' AND NOT failed AND committed_hash IS NULL),
    count(*) FILTER (WHERE decision = 'commit' AND NOT failed AND committed_hash IS NOT NULL AND changed),
    count(*) FILTER (WHERE decision = 'commit' AND NOT failed AND committed_hash IS NOT NULL AND NOT changed)
FROM (
    SELECT batch, decision, committed_hash, item_key IN (SELECT item_key FROM commit_failed) AS failed,
           committed_hash IS DISTINCT FROM encoded_hash OR other_payload
             OR item_key IN (SELECT item_key FROM commit_gone) AS changed
    FROM commit_decision
) AS decided
GROUP BY batch


-- name: delete_items
-- The only statement that deletes items.

DELETE FROM {item} AS item
USING commit_decision AS decided
WHERE decided.decision = 'delete' AND item.item_key = decided.item_key


-- name: update_items
-- What was seen is what the second look saw, so a change since the run's first read is dirty at once.

UPDATE {item} AS item
SET seen_hash = decided.current_hash,
    seen_at = CASE WHEN item.seen_hash IS DISTINCT FROM decided.current_hash THEN now() ELSE item.seen_at END,
    as_first_seen = item.as_first_seen AND item.seen_hash IS NOT DISTINCT FROM decided.current_hash,
    committed_hash = CASE WHEN decided.decision = 'commit' THEN decided.encoded_hash ELSE item.committed_hash END,
    payload = CASE WHEN decided.decision = 'commit' THEN encoded.payload ELSE item.payload END
FROM commit_decision AS decided
LEFT JOIN commit_item AS encoded USING (item_key)
WHERE item.item_key = decided.item_key AND decided.decision IN ('commit', 'leave')
  AND (item.seen_hash IS DISTINCT FROM decided.current_hash
       OR decided.decision = 'commit' AND (item.committed_hash IS DISTINCT FROM decided.encoded_hash
                                         OR decided.other_payload))


-- name: batch_committed
-- The batch counts as rendered with this definition only if each of its committed items was: an item that was left
-- alone may still have texts of an older one. Parameters: collection, batch, definition_hash.

UPDATE embeddings.batch
SET definition_hash = CASE
        WHEN batch.definition_hash = %(definition_hash)s THEN batch.definition_hash
        WHEN EXISTS (SELECT FROM commit_decision
                     WHERE commit_decision.batch = batch.batch AND decision IN ('leave', 'vanished')
                       AND committed_hash IS NOT NULL) THEN NULL
        ELSE %(definition_hash)s
    END,
    committed_at = now(), attempts = 0, next_try = NULL, failure = NULL
WHERE collection = %(collection)s AND batch = %(batch)s


-- name: raise_version
-- The commit's last statement: no row, and so a rollback, if another model has become the current one, or another
-- definition has come into force. And the file of the current model's vectors.
-- Parameters: collection, batch, fingerprint, outcome_hash (NULL: any), changed, file.

WITH raised AS (
    UPDATE embeddings.collection
    SET version = version + %(changed)s::boolean::integer
    WHERE name = %(collection)s AND fingerprint = %(fingerprint)s
      AND coalesce(outcome_hash = %(outcome_hash)s::bytea, true)
    RETURNING version
), filed AS (
    INSERT INTO embeddings.backfill (collection, fingerprint, batch, complete, file)
    SELECT %(collection)s, %(fingerprint)s, %(batch)s, true, %(file)s FROM raised
    ON CONFLICT (collection, fingerprint, batch) DO UPDATE SET complete = true, file = excluded.file
)
UPDATE embeddings.batch SET version = raised.version
FROM raised
WHERE collection = %(collection)s AND batch = %(batch)s
RETURNING raised.version
