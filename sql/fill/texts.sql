-- The texts of a batch that are to have a vector, and whether they have it in this model. Parameter: batch.

SELECT text.id, text.item_key, text.vector_name, text.chunk, text.content_hash, text.text, vector.text_id IS NOT NULL
FROM {item} AS item
JOIN {text} AS text USING (item_key)
LEFT JOIN {written} AS vector ON vector.text_id = text.id
WHERE item.batch = %(batch)s AND NOT text.blank
ORDER BY text.id
