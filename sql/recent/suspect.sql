-- Writes what was seen of some items, under their batches' locks. Where it is what has landed, nothing is written.
-- Parameter: batches.

UPDATE {item} AS item
SET seen_hash = scan.row_hash,
    -- Since when it is dirty: another edit does not make it any younger.
    seen_at = CASE WHEN item.seen_hash IS DISTINCT FROM item.landed_hash THEN coalesce(item.seen_at, now())
                        -- Since it is dirty; but it is not as it was first seen.
                        + CASE WHEN item.landed_hash IS NULL THEN interval '1 microsecond' ELSE '0' END
                   ELSE now() END
FROM scan_row AS scan
WHERE item.item_key = scan.item_key AND item.batch = ANY (%(batches)s::bigint[])
  AND scan.row_hash IS DISTINCT FROM item.landed_hash AND scan.row_hash IS DISTINCT FROM item.seen_hash
RETURNING item.seen_hash
