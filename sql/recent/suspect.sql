-- Writes what was seen of some items, under their batches' locks. Where it is what has landed, nothing is written.
-- Parameter: batches.

UPDATE {item} AS item
SET seen_hash = scan.row_hash,
    -- Since when it is dirty: another edit does not make it any younger.
    seen_at = CASE WHEN item.seen_hash IS DISTINCT FROM item.landed_hash THEN coalesce(item.seen_at, now()) ELSE now() END
FROM scan_row AS scan
WHERE item.item_key = scan.item_key AND item.batch = ANY (%(batches)s::bigint[])
  AND scan.row_hash IS DISTINCT FROM item.landed_hash AND scan.row_hash IS DISTINCT FROM item.seen_hash
RETURNING item.seen_hash
