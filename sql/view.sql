-- What people and other programs query: the active model's vectors. Without a dimension in the cast, so that
-- CREATE OR REPLACE can point it at a model of another dimension; with the vector table's own vector_name, so that a
-- condition on it finds the partial index.

CREATE OR REPLACE VIEW {view} AS
SELECT text.item_key, vector.vector_name, text.chunk, text.text, item.payload, vector.embedding::{bare_type} AS embedding
FROM {vector} AS vector
JOIN {text} AS text ON text.id = vector.text_id
JOIN {item} AS item ON item.item_key = text.item_key;
