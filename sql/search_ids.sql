-- Live items behind text ids that an index found. Parameters: ids, vector_name.

SELECT text.id, item.item_key, item.payload
FROM {text} AS text
JOIN {item} AS item ON item.item_key = text.item_key
WHERE text.id = ANY (%(ids)s) AND text.vector_name = %(vector_name)s
