-- Beside the column: whose text each vector was made from, and what shows the column as a model table. Both views follow
-- their column when it is renamed.

CREATE TABLE IF NOT EXISTS {hash} AS
SELECT 0::bigint AS text_id, ''::bytea AS content_hash, {key_columns} FROM {target} AS target WITH NO DATA;
CREATE UNIQUE INDEX IF NOT EXISTS {text_index} ON {hash} (text_id);
CREATE UNIQUE INDEX IF NOT EXISTS {key_index} ON {hash} ({keys});
CREATE OR REPLACE VIEW {vector} AS
SELECT hash.text_id, {vector_name}::text COLLATE "C" AS vector_name, hash.content_hash, target.{column} AS embedding
FROM {hash} AS hash
JOIN {target} AS target ON {same_row}
WHERE target.{column} IS NOT NULL;
-- Which texts need no vector any more: a row that was deleted since needs none either, until its text goes too.
CREATE OR REPLACE VIEW {written} AS
SELECT hash.text_id, hash.content_hash
FROM {hash} AS hash
LEFT JOIN {target} AS target ON {same_row}
WHERE target.{column} IS NOT NULL OR target.{first_key} IS NULL;
COMMENT ON VIEW {vector} IS {identity}
