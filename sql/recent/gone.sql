-- How many items that have landed would be gone, and how many have landed.

SELECT
    count(*) FILTER (WHERE seen_hash IS NULL OR scan.item_key IS NOT NULL AND scan.row_hash IS NULL),
    count(*)
FROM {item} AS item
LEFT JOIN scan_row AS scan USING (item_key)
WHERE item.landed_hash IS NOT NULL
