-- Of a batch that is filled: vectors of its live texts.

SELECT text.id AS text_id, text.item_key, text.content_hash, staged.embedding, false AS keeps
FROM fill_vector AS staged
JOIN {text} AS text ON text.id = staged.text_id AND text.content_hash = staged.content_hash
