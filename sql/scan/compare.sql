-- How the scan and the ledger differ, without writing anything. An item is gone when it has landed and was not seen.

SELECT
    count(scan.item_key) AS scanned,
    count(*) FILTER (WHERE item.item_key IS NULL) AS new,
    count(*) FILTER (WHERE item.item_key IS NOT NULL AND scan.row_hash IS DISTINCT FROM item.landed_hash
                       AND scan.item_key IS NOT NULL) AS changed,
    count(*) FILTER (WHERE scan.item_key IS NULL AND item.landed_hash IS NOT NULL) AS gone,
    count(*) FILTER (WHERE scan.row_hash = item.landed_hash) AS unchanged,
    count(item.landed_hash) AS landed
FROM scan_row AS scan
FULL JOIN {item} AS item USING (item_key);
