-- How many landed items the scan found gone that were not known to be, how many rows the last whole scan saw, and when it
-- ended. Parameter: collection.

SELECT
    (SELECT count(*) FROM scan_row AS scan JOIN {item} AS item USING (item_key)
     WHERE scan.row_hash IS NULL AND item.landed_hash IS NOT NULL AND item.seen_hash IS NOT NULL),
    coalesce(scanned, 0), coalesce(whole_scan_at::text, '')
FROM (SELECT) AS one LEFT JOIN embeddings.scan ON scan.collection = %(collection)s
