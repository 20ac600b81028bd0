-- Of a landing: the vectors of live texts. keeps: a vector that its row has already is not written over, since the row is
-- as it was when it was first seen, and the vector is the declared profile's.

SELECT text.id AS text_id, text.item_key, text.content_hash, staged.embedding,
       {adopt} AND NOT staged.encoded AND decided.landed_hash IS NULL AND item.seen_hash = decided.encoded_hash
         AND item.seen_at IS NOT DISTINCT FROM item.first_seen_at AS keeps
FROM landing_vector AS staged
JOIN landing_text AS expected USING (row_number)
JOIN landing_decision AS decided ON decided.item_key = expected.item_key AND decided.decision = 'land'
JOIN {item} AS item ON item.item_key = expected.item_key
JOIN {text} AS text
  ON text.item_key = expected.item_key AND text.vector_name = expected.vector_name AND text.chunk = expected.chunk
 AND text.content_hash = staged.content_hash
