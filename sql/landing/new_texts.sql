-- Texts that are not there yet, under new ids.

INSERT INTO {text} AS text (item_key, vector_name, chunk, content_hash, text, blank)
SELECT expected.item_key, expected.vector_name, expected.chunk, expected.content_hash, expected.text, expected.blank
FROM landing_text AS expected
JOIN landing_decision AS decided ON decided.item_key = expected.item_key AND decided.decision = 'land'
ORDER BY expected.row_number
ON CONFLICT (item_key, vector_name, chunk) DO NOTHING
