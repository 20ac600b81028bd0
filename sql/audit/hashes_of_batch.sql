-- The content hashes of a batch's vectors. Parameter: batch.

SELECT vector.content_hash
FROM {item} AS item
JOIN {text} AS text USING (item_key)
JOIN {written} AS vector ON vector.text_id = text.id
WHERE item.batch = %(batch)s
