-- Which texts of these items have their vector. Parameter: keys.

SELECT vector.content_hash
FROM {text} AS text
JOIN {written} AS vector ON vector.text_id = text.id AND vector.content_hash = text.content_hash
WHERE text.item_key = ANY (%(keys)s)
