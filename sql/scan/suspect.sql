-- Writes what the scan saw of one batch, under the batch's lock. Where it is what has landed, nothing is written:
-- a scan only suspects, and never makes an item clean. Parameter: batch.

UPDATE {item} AS item
SET seen_hash = seen.row_hash,
    -- Since when it is dirty: another edit does not make it any younger.
    seen_at = CASE WHEN item.seen_hash IS DISTINCT FROM item.landed_hash THEN coalesce(item.seen_at, now())
                        -- Since it is dirty; but it is not as it was first seen.
                        + CASE WHEN item.landed_hash IS NULL THEN interval '1 microsecond' ELSE '0' END
                   ELSE now() END
FROM (
    SELECT item_key, scan.row_hash
    FROM {item} AS inner_item
    LEFT JOIN scan_row AS scan USING (item_key)
    WHERE inner_item.batch = %(batch)s
) AS seen
WHERE item.item_key = seen.item_key
  AND seen.row_hash IS DISTINCT FROM item.landed_hash
  AND seen.row_hash IS DISTINCT FROM item.seen_hash;
