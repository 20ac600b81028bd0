-- Vectors without their text, and texts without their item. A landing deletes all in one transaction, so there are none
-- unless somebody else wrote.

WITH gone AS (
    DELETE FROM {text} AS text
    WHERE NOT EXISTS (SELECT FROM {item} AS item WHERE item.item_key = text.item_key)
    RETURNING text.id
)
DELETE FROM {hash} AS vector
WHERE vector.text_id IN (SELECT id FROM gone)
   OR NOT EXISTS (SELECT FROM {text} AS text WHERE text.id = vector.text_id)
