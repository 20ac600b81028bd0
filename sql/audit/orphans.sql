-- Vectors without their text. A landing deletes both in one transaction, so there are none unless somebody else wrote.

DELETE FROM {vector} AS vector
WHERE NOT EXISTS (SELECT FROM {text} AS text WHERE text.id = vector.text_id)
