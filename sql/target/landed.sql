-- Of a landing: the vectors of live texts.

SELECT text.id AS text_id, text.item_key, text.content_hash, staged.embedding
FROM landing_vector AS staged
JOIN landing_text AS expected USING (row_number)
JOIN landing_decision AS decided ON decided.item_key = expected.item_key AND decided.decision = 'land'
JOIN {text} AS text
  ON text.item_key = expected.item_key AND text.vector_name = expected.vector_name AND text.chunk = expected.chunk
 AND text.content_hash = staged.content_hash
