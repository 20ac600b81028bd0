-- A full scan: the entire source, staged in the temporary table `scan_row`, compared with the ledger; and what an
-- incremental scan shares with it.


-- name: batches
-- The batches that hold an item of which the ledger does not know yet what the scan saw.

SELECT DISTINCT item.batch
FROM {item} AS item
LEFT JOIN scan_row AS scan USING (item_key)
WHERE scan.row_hash IS DISTINCT FROM item.committed_hash
  AND (scan.row_hash IS DISTINCT FROM item.seen_hash OR item.seen_at > now())
ORDER BY item.batch;


-- name: batches_added
-- Parameters: collection, first and last batch that got new items, size of the last one.

WITH added AS (
    INSERT INTO embeddings.batch (collection, batch)
    SELECT %(collection)s, batch FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS batch
    ON CONFLICT DO NOTHING
)
UPDATE embeddings.collection SET last_batch = %(last)s, last_batch_size = %(size)s WHERE name = %(collection)s


-- name: compare
-- How the scan and the ledger differ, without writing anything. An item is gone when it is committed and was not seen, and
-- new as long as it was never committed.

SELECT
    count(scan.item_key) AS scanned,
    count(*) FILTER (WHERE scan.item_key IS NOT NULL AND never) AS new,
    count(*) FILTER (WHERE scan.item_key IS NOT NULL AND NOT never
                       AND scan.row_hash IS DISTINCT FROM item.committed_hash) AS changed,
    count(*) FILTER (WHERE scan.item_key IS NULL AND item.committed_hash IS NOT NULL) AS gone,
    count(*) FILTER (WHERE scan.row_hash = item.committed_hash) AS unchanged,
    count(item.committed_hash) AS committed
FROM scan_row AS scan
FULL JOIN {item} AS item USING (item_key)
CROSS JOIN LATERAL (SELECT item.item_key IS NULL OR item.committed_hash IS NULL AND item.payload IS NULL AS never) AS never;


-- name: finished
-- Parameters: collection, scanned.

INSERT INTO embeddings.scan (collection, full_scan_at, scanned)
VALUES (%(collection)s, now(), %(scanned)s)
ON CONFLICT (collection) DO UPDATE SET full_scan_at = excluded.full_scan_at, scanned = excluded.scanned


-- name: insert_new
-- Items seen for the first time, in the batches after the last one. Runs under the collection's lock.
-- Parameters: last_batch, last_batch_size, items_per_batch.

WITH new AS (
    SELECT item_key, row_hash, %(last_batch_size)s::bigint + row_number() OVER (ORDER BY item_key) - 1 AS place
    FROM scan_row AS scan
    WHERE row_hash IS NOT NULL AND NOT EXISTS (SELECT FROM {item} AS item WHERE item.item_key = scan.item_key)
)
INSERT INTO {item} (item_key, batch, seen_hash)
SELECT item_key, %(last_batch)s::bigint + place / %(items_per_batch)s::bigint, row_hash
FROM new
ORDER BY place
ON CONFLICT DO NOTHING;


-- name: no_longer_read
-- How many committed items have a row that cannot be read and that was another when they were committed; and how many
-- are committed. Parameter: unreadable (keys).

SELECT
    count(*) FILTER (WHERE scan.row_hash <> item.committed_hash AND scan.item_key = ANY (%(unreadable)s)),
    count(*)
FROM {item} AS item
LEFT JOIN scan_row AS scan USING (item_key)
WHERE item.committed_hash IS NOT NULL


-- name: pending
-- What a sync would work on: every row of the batches in which one is new, different from what is committed, or rendered
-- with another definition. New rows get the batch that `insert_new` would give them.
-- Parameters: collection, definition_hash, items_per_batch, batches (that have other work), everything.

WITH next_batch AS (
    SELECT
        last_batch + (last_batch_size >= %(items_per_batch)s)::integer AS batch,
        CASE WHEN last_batch_size >= %(items_per_batch)s THEN 0 ELSE last_batch_size END AS size
    FROM embeddings.collection WHERE name = %(collection)s
), placed AS (
    SELECT
        scan.item_key,
        coalesce(item.batch, next_batch.batch + (next_batch.size - 1 + row_number()
            OVER (PARTITION BY item.item_key IS NULL ORDER BY scan.item_key)) / %(items_per_batch)s::bigint) AS batch,
        item.committed_hash IS DISTINCT FROM scan.row_hash AS differs
    FROM scan_row AS scan
    CROSS JOIN next_batch
    LEFT JOIN {item} AS item USING (item_key)
), dirty AS (
    SELECT batch FROM placed WHERE differs OR %(everything)s
    UNION
    SELECT unnest(%(batches)s::bigint[])
    UNION
    SELECT item.batch FROM {item} AS item
    WHERE (item.seen_hash IS NOT NULL OR item.committed_hash IS NOT NULL)
      AND NOT EXISTS (SELECT FROM scan_row AS scan WHERE scan.item_key = item.item_key)
    UNION
    SELECT batch.batch
    FROM embeddings.batch
    WHERE batch.collection = %(collection)s AND batch.definition_hash IS DISTINCT FROM %(definition_hash)s
)
SELECT batch, item_key
FROM placed
WHERE batch IN (SELECT batch FROM dirty)
ORDER BY batch, item_key


-- name: stage
-- What one scan saw, for this session alone.

CREATE TEMPORARY TABLE scan_row (item_key text COLLATE "C" NOT NULL, row_hash bytea);


-- name: staged
-- The unique index finds a key that came twice, and serves the comparison of single batches.

CREATE UNIQUE INDEX scan_row_key ON scan_row (item_key);
ANALYZE scan_row;


-- name: staged_keys
-- What a scan saw, where there is nothing yet to compare it with. No placeholders.

SELECT item_key FROM scan_row ORDER BY item_key


-- name: suspect
-- Writes what the scan saw of one batch, under the batch's lock. If it is what is committed, nothing is written:
-- a scan only suspects, and never makes an item clean. Parameter: batch.

UPDATE {item} AS item
SET seen_hash = seen.row_hash,
    -- Since when it is dirty: another edit does not make it any younger. A time that is yet to come is none: the clock
    -- was ahead for a while.
    seen_at = CASE WHEN item.seen_hash IS DISTINCT FROM item.committed_hash THEN least(item.seen_at, now())
                   ELSE now() END,
    as_first_seen = item.as_first_seen AND seen.row_hash IS NOT DISTINCT FROM item.seen_hash
FROM (
    SELECT item_key, scan.row_hash
    FROM {item} AS inner_item
    LEFT JOIN scan_row AS scan USING (item_key)
    WHERE inner_item.batch = %(batch)s
) AS seen
WHERE item.item_key = seen.item_key
  AND seen.row_hash IS DISTINCT FROM item.committed_hash
  AND (seen.row_hash IS DISTINCT FROM item.seen_hash OR item.seen_at > now());
