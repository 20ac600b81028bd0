-- Which of these items have a vector that would be taken, if they landed as they are.

SELECT made.item_key
FROM unnest({item_keys}::text[]) AS made (item_key)
LEFT JOIN {item} AS item USING (item_key),
     jsonb_populate_record(NULL::{hash}, {key_json}) AS typed
JOIN {target} AS target ON {same_as_typed}
WHERE {norm}(target.{column}) > 0 AND item.landed_hash IS NULL
