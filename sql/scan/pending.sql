-- The keys that a sync would look at: new, different from what has landed, or rendered with another definition.
-- Parameters: collection, everything.

SELECT scan.item_key
FROM scan_row AS scan
LEFT JOIN {item} AS item USING (item_key)
LEFT JOIN embeddings.batch ON batch.collection = %(collection)s AND batch.batch = item.batch
LEFT JOIN embeddings.collection ON collection.name = %(collection)s
WHERE %(everything)s
   OR item.landed_hash IS DISTINCT FROM scan.row_hash
   OR batch.definition_hash IS DISTINCT FROM collection.definition_hash
ORDER BY scan.item_key
