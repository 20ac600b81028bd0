-- Items seen for the first time, in the batches after the last one. Runs under the collection's lock.
-- Parameters: last_batch, last_batch_size, items_per_batch.

WITH new AS (
    SELECT item_key, row_hash, %(last_batch_size)s::bigint + row_number() OVER (ORDER BY item_key) - 1 AS place
    FROM scan_row AS scan
    WHERE row_hash IS NOT NULL AND NOT EXISTS (SELECT FROM {item} AS item WHERE item.item_key = scan.item_key)
)
INSERT INTO {item} (item_key, batch, seen_hash, seen_at)
SELECT item_key, %(last_batch)s::bigint + place / %(items_per_batch)s::bigint, row_hash, now()
FROM new
ORDER BY place
ON CONFLICT DO NOTHING;
