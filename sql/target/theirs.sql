-- Vectors that are there already of items that have never landed. `number`: the item's place among its keys.

SELECT made.number AS number, target.{column} AS embedding
FROM unnest({item_keys}::text[]) WITH ORDINALITY AS made (item_key, number)
JOIN {item} AS item ON item.item_key = made.item_key AND item.landed_hash IS NULL,
     jsonb_populate_record(NULL::{target}, {key_json}) AS typed
JOIN {target} AS target ON {same_as_typed}
WHERE target.{column} IS NOT NULL AND NOT EXISTS (SELECT FROM {hash} AS hash WHERE {same_row})
ORDER BY number
