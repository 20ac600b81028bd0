SELECT vector.content_hash, vector.embedding
FROM {item} AS item
JOIN {text} AS text USING (item_key)
JOIN {vector} AS vector ON vector.text_id = text.id
WHERE item.batch = {batch}
