-- Vectors that are there already of items that have never landed, and are as they were first seen. number: the item's
-- place among its keys.

SELECT made.number AS number, target.{column} AS embedding
FROM unnest({item_keys}::text[], {row_hashes}::bytea[]) WITH ORDINALITY AS made (item_key, row_hash, number)
JOIN {item} AS item ON item.item_key = made.item_key AND item.landed_hash IS NULL
                 AND item.seen_hash = made.row_hash AND item.seen_at IS NOT DISTINCT FROM item.first_seen_at,
     jsonb_populate_record(NULL::{hash}, {key_json}) AS typed
JOIN {target} AS target ON {same_as_typed}
WHERE {norm}(target.{column}) > 0 AND NOT EXISTS (SELECT FROM {hash} AS hash WHERE {same_row})
ORDER BY number
