-- An incremental scan: rows that were updated since the last one, in the temporary table `scan_row`.


-- name: batches
-- The batches whose items differ from what the ledger knows, or that a commit works on now. Parameter: in_flight.

SELECT DISTINCT item.batch
FROM scan_row AS scan
JOIN {item} AS item USING (item_key)
WHERE item.batch = ANY (%(in_flight)s::bigint[])
   OR scan.row_hash IS DISTINCT FROM item.committed_hash AND scan.row_hash IS DISTINCT FROM item.seen_hash
ORDER BY item.batch


-- name: gone
-- How many committed items are gone that were not known to be, how many rows the last full scan saw, and when it ended.
-- Parameter: collection.

SELECT
    (SELECT count(*) FROM scan_row AS scan JOIN {item} AS item USING (item_key)
     WHERE scan.row_hash IS NULL AND item.committed_hash IS NOT NULL AND item.seen_hash IS NOT NULL),
    coalesce(scanned, 0), coalesce(full_scan_at::text, '')
FROM (SELECT) AS always LEFT JOIN embeddings.scan ON scan.collection = %(collection)s


-- name: gone_counted
-- How many items are gone since the last full scan, for who does not move the watermark. Parameters: collection, gone.

INSERT INTO embeddings.scan (collection, watermark) VALUES (%(collection)s, %(gone)s::jsonb)
ON CONFLICT (collection) DO UPDATE SET watermark = coalesce(scan.watermark, '{}') || excluded.watermark


-- name: suspect
-- Writes what was seen of some items, under their batches' locks. If it is what is committed, nothing is written.
-- Parameter: batches.

UPDATE {item} AS item
SET seen_hash = scan.row_hash,
    -- Since when it is dirty: another edit does not make it any younger.
    seen_at = CASE WHEN item.seen_hash IS DISTINCT FROM item.committed_hash THEN least(item.seen_at, now())
                   ELSE now() END,
    as_first_seen = false
FROM scan_row AS scan
WHERE item.item_key = scan.item_key AND item.batch = ANY (%(batches)s::bigint[])
  AND scan.row_hash IS DISTINCT FROM item.committed_hash AND scan.row_hash IS DISTINCT FROM item.seen_hash
RETURNING item.seen_hash, item.committed_hash IS NULL AND item.payload IS NULL AS never_committed


-- name: watermark
-- Parameters: collection, watermark.

INSERT INTO embeddings.scan (collection, watermark, read_at)
VALUES (%(collection)s, %(watermark)s, now())
ON CONFLICT (collection) DO UPDATE SET watermark = excluded.watermark, read_at = excluded.read_at
