-- What people and other programs query: the active model's vectors. Without a dimension in the cast, so that
-- CREATE OR REPLACE can point it at a model of another dimension.

CREATE OR REPLACE VIEW {view} AS
SELECT text.item_key, text.vector_name, text.chunk, text.text, item.payload, vector.embedding::{bare_type} AS embedding
FROM {vector} AS vector
JOIN {text} AS text ON text.id = vector.text_id
JOIN {item} AS item ON item.item_key = text.item_key;
