-- The batches whose items differ from what the ledger knows, or that a landing works on now. Parameter: in_flight.

SELECT DISTINCT item.batch
FROM scan_row AS scan
JOIN {item} AS item USING (item_key)
WHERE item.batch = ANY (%(in_flight)s::bigint[])
   OR scan.row_hash IS DISTINCT FROM item.landed_hash AND scan.row_hash IS DISTINCT FROM item.seen_hash
ORDER BY item.batch
