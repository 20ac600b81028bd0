-- The batches that hold an item of which the ledger does not know yet what the scan saw.

SELECT DISTINCT item.batch
FROM {item} AS item
LEFT JOIN scan_row AS scan USING (item_key)
WHERE scan.row_hash IS DISTINCT FROM item.landed_hash AND scan.row_hash IS DISTINCT FROM item.seen_hash
ORDER BY item.batch;
