-- Vectors of live texts that are not there yet, or that this run encoded anew (force).

INSERT INTO {vector} AS vector (text_id, vector_name, content_hash, embedding)
SELECT text.id, text.vector_name, text.content_hash, made.embedding
FROM landing_vector AS made
JOIN landing_text AS expected USING (row_number)
JOIN landing_decision AS decided ON decided.item_key = expected.item_key AND decided.decision = 'land'
JOIN {text} AS text
  ON text.item_key = expected.item_key AND text.vector_name = expected.vector_name AND text.chunk = expected.chunk
 AND text.content_hash = made.content_hash
LEFT JOIN {vector} AS there ON there.text_id = text.id
WHERE there.text_id IS NULL OR there.content_hash <> made.content_hash OR made.encoded
ON CONFLICT (text_id) DO UPDATE
SET vector_name = excluded.vector_name, content_hash = excluded.content_hash, embedding = excluded.embedding
