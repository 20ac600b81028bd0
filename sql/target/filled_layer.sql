-- Of a layer: the vectors of its live texts, which stay until the transaction ends.

SELECT text.id AS text_id, text.item_key, text.content_hash, staged.embedding, false AS keeps
FROM fill_layer AS layered
JOIN fill_vector AS staged USING (text_id)
JOIN {text} AS text ON text.id = staged.text_id AND text.content_hash = staged.content_hash
WHERE layered.layer = {layer}
FOR KEY SHARE OF text
